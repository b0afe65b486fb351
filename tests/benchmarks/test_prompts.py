from __future__ import annotations

import itertools

import pytest

from fastblt.benchmarks.prompts import held_out_prompts, held_out_sources, humaneval_texts, library_prompts
from fastblt.models.vocabulary import BOS_ID, decode


def test_prompts_are_the_same_every_time_and_others_under_another_seed() -> None:
    assert held_out_prompts(20, 100) == held_out_prompts(20, 100)
    assert held_out_prompts(20, 100) != held_out_prompts(20, 100, seed=1)


def test_prompts_are_held_out_text_of_many_files_and_do_not_overlap() -> None:
    prompts = held_out_prompts(60, 128)
    assert all(ids[0] == BOS_ID and len(ids) == 129 for ids in prompts)
    texts = [decode(ids) for ids in prompts]
    assert all(len(text) == 128 for text in texts) and len(set(texts)) == 60
    sources = held_out_sources()
    assert all(source.held_out for source in sources)
    homes = [[source for source in sources if text in source.data] for text in texts]
    assert len({home[0].path for home in homes}) > 10
    # Of texts that stand in one place only.
    once = [(home[0], text) for home, text in zip(homes, texts, strict=True) if len(home) == 1]
    places = sorted((home.path, home.data.index(text)) for home, text in once if home.data.count(text) == 1)
    assert len(places) > 50
    for (path, at), (other, after) in itertools.pairwise(places):
        assert path != other or after - at >= 128


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="have text for"):
        held_out_prompts(10_000, 256)


def test_the_prompts_of_the_package() -> None:
    texts = humaneval_texts()
    assert len(texts) == 164 and all("def " in text for text in texts)


def test_long_prompts() -> None:
    prompts = library_prompts(16, 16_000)
    assert all(ids[0] == BOS_ID and len(ids) == 16_000 for ids in prompts)
    assert len({tuple(ids) for ids in prompts}) == 16
