"""Wildcards: choices in prompts; equal submissions draw equal choices."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from farm.errors import InvalidInput
from farm.specs.sources import Expansion, Problems, specs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("wildcards")
    (folder / "places").mkdir(parents=True)
    (folder / "animal.txt").write_text("\ufeff# comment\r\ncat\r\n\r\n  dog  \r\n", "utf-8")
    (folder / "style.txt").write_text("oil {on wood|on canvas}\nink with a __animal__\n")
    (folder / "places" / "far_away.txt").write_text("the moon\n")
    return folder


def prompts(*found: Any, wildcards: Any = True, **options: Any) -> list[str]:
    problems = Problems()
    defaults = options.pop("defaults", {})
    made = Expansion.read(problems, wildcards=wildcards, **options)
    if problems:
        raise problems.error()
    return [spec.prompt for spec in specs(found, defaults, expansion=made)]


def complaint(*found: Any, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        prompts(*found, **options)
    (problem,) = caught.value.problems
    return str(problem)


def test_a_choice_is_one_of_its_options_and_all_of_them_come_up() -> None:
    drawn = Counter(prompts(*["a {red|blue|} cat"] * 300))
    assert drawn.keys() == {"a red cat", "a blue cat", "a  cat"}
    assert min(drawn.values()) > 60


def test_choices_stand_in_choices() -> None:
    assert set(prompts(*["{a {b|c}|d{|e{f|g}}}"] * 300)) == {"a b", "a c", "d", "def", "deg"}


def test_a_name_stands_for_a_line_of_its_file(folder: Path) -> None:
    assert set(prompts(*["a __animal__!"] * 50)) == {"a cat!", "a dog!"}
    assert set(prompts(*["__style__"] * 100)) == {
        "oil on wood",
        "oil on canvas",
        "ink with a cat",
        "ink with a dog",
    }
    assert prompts("on __places/far_away__") == ["on the moon"]


def test_the_folder_may_be_another(folder: Path) -> None:
    folder.rename("elsewhere")
    assert prompts("__animal__", wildcards="elsewhere")[0] in ("cat", "dog")
    assert complaint("a", wildcards="nowhere") == "wildcards: there is no folder nowhere"


def test_the_same_submission_draws_the_same() -> None:
    given = ["{1|2|3|4|5|6|7|8|9} {1|2|3|4|5|6|7|8|9}"] * 20
    assert prompts(*given) == prompts(*given)
    assert prompts(*given, wildcard_seed=1) == prompts(*given, wildcard_seed=1)
    assert prompts(*given, wildcard_seed=1) != prompts(*given, wildcard_seed=2)
    assert prompts(*given, defaults={"seed": 1}) != prompts(*given, defaults={"seed": 2})


def test_what_is_drawn_does_not_change_from_version_to_version() -> None:
    given = ["{1|2|3|4|5|6|7|8|9} {1|2|3|4|5|6|7|8|9}"] * 4
    assert prompts(*given) == ["7 7", "8 9", "5 3", "1 7"]
    assert prompts(*given, defaults={"seed": 7}) == ["1 8", "5 7", "5 8", "7 4"]


def test_each_seed_draws_anew_and_the_places_of_a_grid_do_not() -> None:
    text = "{1|2|3|4|5|6|7|8|9} {1|2|3|4|5|6|7|8|9}"
    seeds = prompts(text, seeds=range(20))
    assert len(set(seeds)) > 10
    assert prompts(text, seeds=range(20), wildcard_seed=3).count(prompts(text, wildcard_seed=3)[0]) == 20
    assert len(set(prompts(text, grid="steps=1..20"))) == 1
    assert prompts({"prompt": text, "seed": "5"}) == prompts({"prompt": text, "seed": 5}) == [seeds[5]]


def test_negative_prompts_draw_too() -> None:
    made = specs(
        [{"prompt": "a", "negative_prompt": "{x|y}"}] * 30, {}, expansion=Expansion.read(Problems(), wildcards=True)
    )
    assert {spec.negative_prompt for spec in made} == {"x", "y"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\{a\|b\}", "{a|b}"),
        (r"\__animal\__", "__animal__"),
        (r"a \\ b", "a \\ b"),
        (r"(a:1.2) \(b\)", r"(a:1.2) \(b\)"),
        ("{a} {b c}", "{a} {b c}"),
        ("a|b", "a|b"),
        ("snake_case __ ____ a__b", "snake_case __ ____ a__b"),
        (r"{x\|y|x\|y}", "x|y"),
        ("{{a|a}}", "{a}"),
    ],
)
def test_what_is_no_choice_stays_and_a_backslash_makes_it_none(written: str, meant: str) -> None:
    assert prompts(written) == [meant]


def test_without_asking_nothing_is_drawn() -> None:
    given = [r"a {red|blue} __animal__ \{ {"]
    assert [spec.prompt for spec in specs(given, {})] == given
    assert prompts(*given, wildcards=False, grid="steps=1") == given


def test_an_unknown_name_says_what_is_there(folder: Path) -> None:
    said = "there is no wildcards/animals.txt for __animals__; the folder has animal, places/far_away, style"
    assert complaint("__animals__") == f"spec 1: prompt: {said}"
    # The error does not depend on the draw, and covers negative prompts and files as well.
    assert complaint("{a|{b|c|d|e|f|g|__animals__}}") == f"spec 1: prompt: {said}"
    (folder / "bad.txt").write_text("fine\nnot __animals__\n")
    assert complaint("__bad__").startswith("spec 1: prompt: wildcards/bad.txt:2: there is no wildcards/animals.txt")


def test_without_a_folder_a_name_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint("__a__").endswith("there is no wildcards/a.txt for __a__; nor such a folder")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "."])
def test_a_name_can_not_lead_out_of_its_folder(folder: Path, name: str) -> None:
    Path("secret.txt").write_text("secret")
    assert prompts(f"__{name}__") == [f"__{name}__"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {b|c", "has a { at character 3 that nothing closes"),
        ("a b|c}", "has a } at character 6 that nothing opens"),
        ("{" * 30 + "}" * 30, "has braces deeper than 20 at character 21"),
        ("{" * 20_000, "has braces deeper than 20"),
        (
            "{" + "x" * 15_000 + "|" + "y" * 15_000 + "}" + "x" * 15_000,
            "longer than 20000 characters when it is written",
        ),
    ],
)
def test_a_text_that_can_not_be_drawn_from_says_why(text: str, said: str) -> None:
    assert said in complaint(*[text], wildcard_seed=2)


def test_files_that_name_each_other_come_to_an_end(folder: Path) -> None:
    (folder / "a.txt").write_text("__b__")
    (folder / "b.txt").write_text("x __a__")
    assert "wildcard files include each other: a → b → a" in complaint("__a__")
    for n in range(12):
        (folder / f"deep{n}.txt").write_text(f"__deep{n + 1}__")
    assert "more than 10 deep" in complaint("__deep0__")
    for n in range(9):
        (folder / f"wide{n}.txt").write_text(f"__wide{n + 1}__" * 10)
    (folder / "wide9.txt").write_text("{|}")
    assert "draws more than 10,000 choices" in complaint("__wide0__")


def test_a_file_that_can_not_be_read_says_so(folder: Path) -> None:
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "empty.txt").write_text("# nothing\n\n")
    assert complaint("__latin__") == "spec 1: prompt: wildcards/latin.txt is not UTF-8; save the file as UTF-8"
    assert complaint("__empty__") == "spec 1: prompt: wildcards/empty.txt has no choices in it"


def test_every_row_with_a_fault_is_told() -> None:
    with pytest.raises(InvalidInput) as caught:
        prompts("{", "fine", "}", {"prompt": "}", "negative_prompt": "{", "eta": 2}, seeds=range(9))
    assert [str(problem).split(" at ")[0] for problem in caught.value.problems] == [
        "spec 1: prompt: has a {",
        "spec 3: prompt: has a }",
        "spec 4: prompt: has a }",
        "spec 4: negative_prompt: has a {",
        "spec 4: eta: should be less than or equal to 1, not 2",
    ]
