"""The measuring itself: ratios, slopes, and the file of results."""

import pytest

from bench import scaling, shapes, timing


def test_a_slope_is_the_power_of_the_size():
    assert scaling.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert scaling.slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


def test_a_section_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "RESULTS.md")
    timing.write_section("One", "a")
    timing.write_section("Two", "b")
    timing.write_section("One", "c")
    text = timing.RESULTS.read_text()
    assert text.count("## One") == text.count("## Two") == 1
    assert "\n\nc\n" in text
    assert "\n\nb\n" in text
    assert "\na\n" not in text


def test_a_run_replaces_the_rows_it_measured_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "RESULTS.md")
    head = "| what | shape | ratio |\n|---|---|---|\n"
    assert timing.with_rows_of("Ratios", ["| a | x | 1 |"]) == ["| a | x | 1 |"]
    timing.write_section("Ratios", head + "| a | x | 1 |\n| b | x | 2 |")
    timing.write_section("Other", head + "| a | x | 9 |")
    rows = timing.with_rows_of("Ratios", ["| b | x | 3 |", "| b | y | 4 |"])
    assert rows == ["| a | x | 1 |", "| b | x | 3 |", "| b | y | 4 |"]


def test_the_yardstick_has_the_weights_of_the_model_and_no_memory_of_its_own():
    with shapes.opened("small", layers=2) as model:
        own, pairs = shapes.stock(model), shapes.pairs_for(model, 2)
        assert own.backbone.embeddings.weight.data_ptr() == model._module.backbone.embeddings.weight.data_ptr()
        assert (own(pairs.clean).logits == model._module(pairs.clean, use_cache=False).logits).all()
        assert pairs.first_difference.tolist() == [1, 1]
