"""<lora:...> in prompts."""

import pytest

from ldm_jax.prompting import networks


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a <lora:sky:0.8> b", "a  b", [("sky", 0.8, 0.8)]),
        ("<lora:sky>", "", [("sky", 1, 1)]),
        ("<lora:sky:0.3:0.7>", "", [("sky", 0.7, 0.3)]),
        ("<lora:a:te=0:unet=2><lyco:b:-1>", "", [("a", 2, 0), ("b", -1, -1)]),
        ("a <cat>", "a <cat>", []),
    ],
)
def test_names_and_scales(prompt, text, found):
    assert networks.cut(prompt) == (text, found)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<hypernet:a:1>", "<hypernet:a:1>: only <lora:NAME:SCALE> is known"),
        ("<lora:a:x>", "'x' is no finite number"),
        ("<lora:a:nan>", "'nan' is no finite number"),
        ("<lora:a:1:2:3>", "give <lora:NAME>"),
    ],
)
def test_what_is_no_lora_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        networks.cut(prompt)
