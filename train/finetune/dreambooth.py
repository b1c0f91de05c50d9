"""DreamBooth (Ruiz et al. 2023): one text for the subject's pictures, and pictures of its class.

The class's pictures keep the model from forgetting the class. Those that are missing are drawn by
the model itself before the first step, into a folder that says whose and of what they are.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from ldm_jax import conditioning, data, finite, loading, sampling, schema, sharding
from ldm_jax.data import examples, folder
from ldm_jax.prompting import batch as prompting
from ldm_jax.runtime import checkpoint, images, processes, reading, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train.finetune.loss import PRIOR, has_prior

MARK = "class_images.json"
"""File in a folder of pictures that were drawn here: {"prompt", "model"}."""
GUIDANCE = 7.5
OF_CLASS = 1  # joins the seed: the order of the class's pictures


def texts(config: schema.AdapterTrainConfig) -> tuple[str, ...]:
    """The text of every picture of the subject; () for another recipe."""
    return (config.instance_prompt,) if isinstance(config, schema.DreamBoothTrainConfig) else ()


def check(config: schema.AdapterTrainConfig) -> None:
    """ValueError for options of DreamBooth that are missing or do not fit each other."""
    if not isinstance(config, schema.DreamBoothTrainConfig):
        return
    if not config.instance_prompt.strip():
        raise ValueError(
            "--instance-prompt TEXT is missing: the text of every picture of the subject, with a"
            ' rare word for it, as "a photo of sks dog"'
        )
    if not isinstance(config.cond, schema.TextCondConfig):
        name = conditioning.name_of(config.cond)
        raise ValueError(f"the model is conditioned on a {name}: DreamBooth needs one of text")
    finite.checked(config.prior_weight, "--prior-weight", least=0)
    if config.cache.path and config.class_prompt:
        raise ValueError(
            f"--cache.path {config.cache.path}: the class's pictures are in no latent cache; train"
            " without one"
        )
    if config.class_prompt and config.num_class_images < 1:
        raise ValueError(f"--num-class-images {config.num_class_images}: give at least 1")
    if config.class_path and not config.class_prompt:
        raise ValueError(f"--class-path {config.class_path}: give their text too, --class-prompt")
    if has_prior(config):
        _check_folder(config, folder_of(config, ""))


def folder_of(config: schema.DreamBoothTrainConfig, run: epath.PathLike) -> epath.Path:
    """Folder of the class's pictures."""
    return checkpoint.absolute(config.class_path or epath.Path(run) / "class_images")


def _check_folder(config: schema.DreamBoothTrainConfig, path: epath.Path) -> None:
    """ValueError for pictures that another model drew, or that are of another text."""
    mark = path / MARK
    if not config.class_path or not mark.exists():
        return
    known = reading.read_object(mark, "give another --class-path")
    for name, asked in (("prompt", config.class_prompt), ("model", config.init_from)):
        if known.get(name) != asked:
            raise ValueError(
                f"{path}: holds pictures of {name} {known.get(name)!r} ({MARK}), not of {asked!r};"
                " give another --class-path, or remove the folder"
            )


class Pair(NamedTuple):
    """An example of the subject and one of the class."""

    subject: examples.Made
    prior: examples.Made


class _Pairs(grain.MapDataset):
    """Example i of two datasets, together."""

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: int | slice) -> Pair:
        if isinstance(index, slice):
            return self.slice(index)
        return Pair(self.parents[0][index], self.parents[1][index])


class PairStream(data.Stream):
    """The subject's stream, whose examples also hold one of the class under names with `PRIOR`."""

    def __init__(self, subject: data.Stream, prior: data.Stream) -> None:
        self.__dict__.update(subject.__dict__)
        self._prior = prior
        self._names = [name for name in prior.spec if name in ("image", "tokens")]
        self.spec = subject.spec | {PRIOR + name: prior.spec[name] for name in self._names}
        self.made = _Pairs([subject.made, prior.made])

    def accept(self, made: Pair) -> examples.Example:
        """See `data.Stream`."""
        of_class = self._prior.accept(made.prior)
        subject = super().accept(made.subject)
        return subject | {PRIOR + name: of_class[name] for name in self._names}


def with_class_images(
    config: schema.AdapterTrainConfig,
    run: epath.Path,
    stream: data.Stream,
    tokenizer: Any,
    mesh: Mesh,
) -> data.Stream:
    """The stream with the class's pictures, if the config has any; draws those that are missing."""
    if not isinstance(config, schema.DreamBoothTrainConfig) or not has_prior(config):
        return stream
    path = folder_of(config, run)
    draw_missing(config, path, tokenizer, mesh)
    source = schema.FolderConfig(path=str(path), eval_every=0)
    of_class = data.stream(
        dataclasses.replace(config.data, source=source, allow_upscale=True),
        batch_size=config.batch_size,
        seed=config.seed ^ OF_CLASS,
        tokenizer=tokenizer,
        captions=(config.class_prompt,),
    )
    LOG.info(f"{of_class.num_records} pictures of the class in {path}")
    return PairStream(stream, of_class)


def draw_missing(
    config: schema.DreamBoothTrainConfig, path: epath.Path, tokenizer: Any, mesh: Mesh
) -> None:
    """Draw pictures of the class into a folder until it holds `num_class_images`.

    Pictures of one's own, in a folder without `MARK`, are taken as they are. Picture number i is
    the same whenever it is drawn, so that an interrupted start goes on.
    """
    known = folder.find_files(str(path)) if path.exists() else set()
    pictures = {name for name in known if folder.is_image(name)}
    if pictures and MARK not in known:
        LOG.info(f"{path}: {len(pictures)} pictures of your own are the class's; none is drawn")
        return
    missing = [i for i in range(config.num_class_images) if f"{i:05d}.png" not in pictures]
    processes.barrier("looked for class images")
    if not missing:
        return
    mark = {"prompt": config.class_prompt, "model": config.init_from}
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
    rundir.write_text(path / MARK, json.dumps(mark, ensure_ascii=False) + "\n")
    model = loading.load(config.init_from, mesh=mesh, dtype=config.dtype)
    model = dataclasses.replace(model, tokenizer=model.tokenizer or tokenizer)
    at_once = 8 * mesh.shape["data"] * mesh.shape["fsdp"]
    sample = jax.jit(
        sampling.make_sampler(model, config.sample_steps), out_shardings=sharding.replicated(mesh)
    )
    batch = prompting.prompts(model, [config.class_prompt] * at_once)
    cond, null = jax.jit(model.encode)(batch, model.params)
    bar = tqdm.tqdm(total=len(missing), unit="image", desc="pictures of the class")
    for first in range(0, len(missing), at_once):
        some = missing[first : first + at_once]
        keys = sampling.keys_of(config.seed, np.resize(np.asarray(some), at_once))
        drawn = np.asarray(sample(model.params, cond, keys, null, guidance_scale=GUIDANCE))
        pixels = images.to_uint8(drawn[: len(some)])
        if jax.process_index() == 0:
            for i, image in zip(some, pixels, strict=True):
                images.save_png(path / f"{i:05d}.png", image)
        bar.update(len(some))
    bar.close()
    processes.barrier("class images")
