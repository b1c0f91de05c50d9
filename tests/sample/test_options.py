"""Options that tasks share: classes by id and by name."""

import dataclasses
import types

import pytest
import task_models

from ldm_jax import loading, saving, schema
from ldm_jax.sample.options import label_ids, label_text


def model_of(*names, count=None):
    cond = types.SimpleNamespace(num_classes=count or len(names))
    return types.SimpleNamespace(config=types.SimpleNamespace(cond=cond), classes=names or None)


def test_a_class_is_an_id_or_a_name():
    model = model_of("cat", "dog", "a red car")
    assert label_ids(model, ("dog", "0", "a red car", 1)) == (1, 0, 2, 1)
    assert label_ids(model, ("name:cat", "id:2")) == (0, 2)
    assert label_ids(model_of(count=10), ("7", 3)) == (7, 3)
    assert (label_text(model, 1), label_text(model_of(count=10), 7)) == ("1 dog", "7")


def test_a_number_that_is_another_class_by_name_has_to_say_which():
    model = model_of("1", "10", "2")  # folders sort as text
    assert label_ids(model, ("id:1", "name:1", "name:10", 2)) == (1, 0, 1, 2)
    with pytest.raises(
        ValueError, match="is the id of '10', and the name of class 0: give id:1 or"
    ):
        label_ids(model, ("1",))
    assert label_ids(model_of("0", "1", "2"), ("1",)) == (1,)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("dgo", "--labels dgo: is no class of the model; is 'dog' meant\\? it has 0 cat, 1 dog"),
        ("2", "--labels 2 is not in 0..1, the model's classes"),
        ("-1", "--labels -1 is not in 0..1"),
        ("id:dog", "--labels id:dog is not in 0..1"),
        ("name:1", "--labels name:1: is no class of the model"),
    ],
)
def test_what_is_no_class_is_refused(label, message):
    with pytest.raises(ValueError, match=message):
        label_ids(model_of("cat", "dog"), (label,))


def test_a_model_without_names_takes_ids_alone():
    with pytest.raises(ValueError, match=r"keeps no names of its classes: give ids of 0\.\.9"):
        label_ids(model_of(count=10), ("dog",))


def test_names_of_classes_are_saved_with_a_model(tmp_path):
    """As `ldm-convert RUN RUN2 --to ldm_jax` and `ldm_jax.save` write it."""
    names = ("cat", "dog", "emu", "größe")
    cond = schema.ClassCondConfig(num_classes=4, via="label")
    model = dataclasses.replace(task_models.make(cond, num_classes=5), classes=names)
    saving.save(model, tmp_path / "run")
    again = loading.load(tmp_path / "run", shapes_only=True)
    assert again.classes == names
    assert label_ids(again, ("größe", 0)) == (3, 0)
