"""How the page looks, its keys, and the line that tells how far a request is."""

import html
import time

from ldm_jax.sample.web.jobs import Job

HINT = "Ctrl+Enter generates, Escape interrupts."
KEYS = """
() => {
  const click = (id) => document.querySelector(id)?.click();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") click("#interrupt");
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    click("#generate");
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#generate") || window.innerWidth > 640) return;
    document.querySelector("#status").scrollIntoView({behavior: "smooth"});
  });
  document.body.dataset.keys = "ready";
}
"""
CSS = """
.gradio-container {width: 100% !important; max-width: 90rem !important; margin: auto}
#status progress {
  width: 100%; height: 0.6rem; border: 0; appearance: none; overflow: hidden;
  border-radius: 0.3rem; background: var(--border-color-primary);
}
#status progress::-webkit-progress-bar {background: var(--border-color-primary)}
#status progress::-webkit-progress-value {background: var(--color-accent)}
#status progress::-moz-progress-bar {background: var(--color-accent)}
#status progress:indeterminate {
  background: linear-gradient(
    90deg, var(--border-color-primary) 30%, var(--color-accent), var(--border-color-primary) 70%
  ) 0 0 / 200% 100%;
  animation: waits 2s linear infinite;
}
#status progress:indeterminate::-webkit-progress-bar {background: none}
#status progress:indeterminate::-moz-progress-bar {background: none}
@keyframes waits {from {background-position: 200% 0} to {background-position: 0 0}}
#status {min-height: 3rem}
#actions button {min-height: 3rem}
#seeds {align-items: end}
#gallery img, #preview img {image-rendering: pixelated}
#preview :has(> img), #preview :has(> div > img), #preview img {width: 100%}
#preview img {max-height: 32rem; object-fit: contain}
.note {color: var(--body-text-color-subdued)}
@media (max-width: 40rem) {
  .gradio-container .app {padding: 0.5rem 0.5rem 5rem !important}
  #work .row, #work .form {flex-wrap: wrap; min-width: 0}
  #work .column {min-width: 0 !important; width: 100%}
  #work {flex-direction: column}
  #tabs button[role=tab] {padding: 0.4rem 0.6rem}
  #work #actions {
    position: fixed; bottom: 0; left: 0; right: 0; z-index: 50; flex-wrap: nowrap;
    padding: 0.5rem; background: var(--body-background-fill);
    border-top: 1px solid var(--border-color-primary);
  }
  #work #actions button {min-width: 0; padding: 0.25rem; font-size: 0.85rem}
}
"""


def bar(job: Job, place: int, size: str) -> str:
    """HTML of how far a job is.

    place: its place in the queue, 0 if it does not wait; size: of what is drawn, as "3x512x512".
    """
    watch = job.watch
    if place:
        told = f"waits; {place - 1} before it" if place > 1 else "waits; it is the next one"
        return f"<progress></progress> {told}"
    if watch.doing != "sampling" or not watch.steps:
        what = f"compiling the sampler for {size}" if watch.doing == "compiling" else watch.doing
        seconds = time.monotonic() - watch.since
        return f"<progress></progress> {html.escape(what)} ... {seconds:.0f} s"
    eta = "" if watch.eta is None else f", {watch.eta:.0f} s left"
    told = f"step {watch.step} of {watch.steps}{eta}"
    return f'<progress value="{watch.fraction:.3f}"></progress> {told}'


def ended(job: Job, count: int) -> str:
    """HTML of a job that has given some pictures."""
    compiled = f"; compiled in {job.watch.compiled:.1f} s" if job.watch.compiled else ""
    return f"{count} picture{'s' * (count != 1)}{compiled}. {HINT}"
