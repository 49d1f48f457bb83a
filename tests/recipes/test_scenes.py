"""Scenes: captions mean one thing, splits share nothing, pictures show what was said, items never change."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gencontrol.errors import UsageError
from gencontrol.recipes.scenes.data import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    CaptionError,
    SceneSpec,
    Thing,
    caption,
    category,
    parse,
)
from gencontrol.recipes.scenes.data.corpus import (
    HELD_OUT_WORDS,
    SHARES,
    TRAIN_WORDS,
    SceneCorpus,
    is_held_out,
    meaning,
    sample_captions,
    sample_spec,
)
from gencontrol.recipes.scenes.data.font import GLYPHS, HEIGHT, PITCH, WIDTH
from gencontrol.recipes.scenes.data.render import GAP, SIDE, Scene, arrange, coverage, letters, render
from gencontrol.recipes.scenes.data.words import damage, random_word_image
from gencontrol.recipes.scenes.text import FACTS, build_tokenizer, caption_targets


def test_captions_are_read_back() -> None:
    rng = np.random.default_rng(0)
    for kind in CATEGORIES:
        for split in ("train", "test"):
            for _ in range(40):
                spec = sample_spec(rng, split, kind)  # type: ignore[arg-type]  # a literal
                assert parse(caption(spec)) == spec and category(spec) == kind
                assert parse(f"  {caption(spec).replace(' ', '  ')}. ") == spec


def test_a_caption_by_hand() -> None:
    assert parse("a large red circle, a square and a small cross") == SceneSpec(
        (Thing("circle", "red", "large"), Thing("square"), Thing("cross", None, "small"))
    )
    assert parse("four purple crosses") == SceneSpec((Thing("cross", "purple", None, 4),))
    assert parse("a circle left of a blue square") == SceneSpec((Thing("circle"), Thing("square", "blue")), "left of")
    assert parse("the word OX in cyan") == SceneSpec(word="OX", word_colour="cyan")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "out of order"),
        ("a cat", "unknown word 'cat'"),
        ("a sqare", "Did you mean 'square'?"),
        ("a red large circle", "out of order"),
        ("two circle", "does not follow"),
        ("a circles", "does not follow"),
        ("a circle and a circle", "same thing twice"),
        ("two circles and a square", "stand alone"),
        ("a circle and a square and a cross", "joins too much"),
        ("a circle, a square", "no list"),
        ("a circle left of a square and a cross", "out of order"),
        ("a circle above a square below a cross", "joins too much"),
        ("the word cat", "capital letters"),
        ("the word HELLO", "capital letters"),
        ("the word CAT in pink", "no word caption"),
    ],
)
def test_other_texts_are_refused_with_a_reason(text: str, part: str) -> None:
    with pytest.raises(CaptionError, match=part.replace("?", r"\?")):
        parse(text)


def test_splits_share_no_meaning_and_cover_every_category() -> None:
    train = {meaning(parse(text)) for text in sample_captions(1500)}
    for kind in CATEGORIES:
        test = {meaning(parse(text)) for text in sample_captions(30, split="test", kind=kind)}
        assert len(test) >= 2 and not test & train
    assert meaning(parse("a circle below a square")) == meaning(parse("a square above a circle"))
    assert meaning(parse("a circle left of a square")) != meaning(parse("a square left of a circle"))
    assert meaning(parse("a circle and a square")) == meaning(parse("a square and a circle"))
    assert not set(HELD_OUT_WORDS) & set(TRAIN_WORDS) and not set("SHARES") & set(HELD_OUT_WORDS)
    assert all(
        word in HELD_OUT_WORDS for text in sample_captions(40, split="test", kind="word") for word in [text.split()[2]]
    )
    assert not is_held_out(parse("a circle")) and sum(SHARES.values()) == pytest.approx(1.0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'counting'"):
        sample_captions(1, kind="countin")
    with pytest.raises(UsageError, match="no split 'val'"):
        sample_captions(1, split="val")  # type: ignore[arg-type]  # what a caller could pass


def test_layouts_keep_gaps_borders_and_relations() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        spec = sample_spec(rng, "train")
        scene = arrange(spec, rng)
        c, r = scene.centres, scene.radii
        assert len(r) == spec.total
        assert (c - r[:, None] >= 0.49).all() and (c + r[:, None] <= SIDE - 1.49).all()
        for i, j in itertools.combinations(range(len(r)), 2):
            assert np.abs(c[i] - c[j]).max() >= r[i] + r[j] + GAP - 1e-9
        if spec.relation:
            axis = spec.relation in ("above", "below")
            sign = 1 if spec.relation in ("left of", "above") else -1
            assert sign * (c[1] - c[0])[int(axis)] >= r.sum() + GAP - 1e-9


def test_coverage_has_the_areas_of_the_shapes() -> None:
    """Circle πr², square (1.8 r)², triangle 2r², cross 4·2r·w − 4w² with w = 0.34 r; 3 % for the cut at one pixel."""
    r = 5.4
    areas = coverage(np.arange(4), np.full((4, 2), 15.5), np.full(4, r)).sum((1, 2))
    expected = np.array([np.pi, 3.24, 2.0, 8 * 0.34 - 4 * 0.34**2]) * r**2
    np.testing.assert_allclose(areas, expected, rtol=0.03)


def test_render_paints_ground_objects_and_letters() -> None:
    paint = np.array([COLOURS["red"]])
    scene = Scene(np.array([1]), paint, np.array([[10.0, 20.0]]), np.array([5.0]), 0.1)
    none = np.zeros(0)
    word = Scene(none.astype(int), none.reshape(0, 3), none.reshape(0, 2), none, 0.1, "AB", (0.0, 1.0, 0.0), (3, 12))
    image, spelled = render([scene, word])
    np.testing.assert_allclose(image[:, 20, 10], COLOURS["red"], rtol=1e-6)
    np.testing.assert_allclose(image[:, 0, 0], 0.1, rtol=1e-6)
    mask = letters("AB", (3, 12)) > 0
    np.testing.assert_array_equal(spelled[1] > 0.5, mask)
    np.testing.assert_array_equal(mask[12 : 12 + HEIGHT, 3 + PITCH : 3 + PITCH + WIDTH], GLYPHS[1] > 0)


def test_glyphs_differ_from_each_other() -> None:
    distances = np.abs(GLYPHS[:, None] - GLYPHS[None]).sum((2, 3)) + 99 * np.eye(26)
    assert distances.min() >= 2 and {tuple(g.ravel()) for g in GLYPHS.astype(int)}.__len__() == 26


def test_items_are_a_function_of_seed_and_number() -> None:
    corpus, other = SceneCorpus(build_tokenizer(), size=50, seed=3), SceneCorpus(None, seed=4)
    images, cond = corpus.read([7, 3], [0, 0])
    again, _ = corpus.read([3], [0])
    assert cond is not None and torch.equal(images[1], again[0]) and images.shape == (2, 3, 32, 32)
    assert torch.equal(corpus.images([7]) * 2 - 1, images[:1]) and not torch.equal(
        other.images([7]) * 2 - 1, images[:1]
    )
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    assert cond["ids"].shape == cond["mask"].shape and corpus.text(7) == caption(corpus.spec(7))
    assert other.read([0], [0])[1] is None and len(corpus) == 50


def test_every_caption_has_its_tokens() -> None:
    tokenizer = build_tokenizer()
    for text in [*sample_captions(200), *sample_captions(100, split="test")]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) <= 24
    assert tokenizer.convert_ids_to_tokens(tokenizer("the word CAT")["input_ids"]) == "<s> the word C A T </s>".split()


def test_facts_of_a_caption() -> None:
    facts = caption_targets([parse("a circle left of a large cyan cross"), parse("the word AZ in red")]).tolist()
    assert len(FACTS) == len(facts[0]) and all(max(f) < k for f, k in zip(zip(*facts, strict=True), FACTS, strict=True))
    assert facts[0] == [1, 0, 0, 1, len(SHAPES), len(COLOURS), 2, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert facts[1] == [0] * 13 + [1, 1, 26, 0, 0]


def test_damage_is_none_at_zero_and_keeps_the_mean_of_blurred_images() -> None:
    images = SceneCorpus(None).images(range(4))
    zero = torch.zeros(4)
    torch.testing.assert_close(damage(images, zero, zero, torch.ones_like(images)), images, atol=1e-6, rtol=0)
    soft = damage(images, torch.full((4,), 0.8), zero, torch.ones_like(images))
    torch.testing.assert_close(soft.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5, rtol=0)
    assert float((soft - images).abs().max()) > 0.05


def test_scrambled_letters_are_not_spelled() -> None:
    rng = np.random.default_rng(0)
    assert all(random_word_image(rng, 1.0)[1] == "" for _ in range(5))
    image, word = random_word_image(rng, 0.0)
    assert 1 <= len(word) <= 4 and image.shape == (3, 32, 32) and image.min() >= 0 and image.max() <= 1
