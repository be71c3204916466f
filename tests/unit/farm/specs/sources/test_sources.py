import tracemalloc
from pathlib import Path

import pytest

from farm.errors import InvalidInput, Problem
from farm.specs import sources
from farm.specs.spec import RenderSpec


def read(*arguments: object, **defaults: object) -> list[RenderSpec]:
    return list(sources.specs(sources.rows(map(str, arguments)), defaults))


def complaints(*arguments: object) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read(*arguments)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, data: str | bytes) -> Path:
        path = Path(name)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


def test_arguments_are_prompts_unless_they_are_files(file) -> None:
    file("p.txt", "from a file\n")
    assert [spec.prompt for spec in read("a cat", "p.txt", "a dog")] == ["a cat", "from a file", "a dog"]


def test_a_text_file_has_a_prompt_a_line(file) -> None:
    path = file("p.txt", "\ufeffa cat\r\n\n# a comment\n  a dog  \n")
    assert [spec.prompt for spec in read(path)] == ["a cat", "a dog"]


def test_csv_columns_are_fields_and_empty_cells_leave_them_out(file) -> None:
    path = file("p.csv", '\ufeffprompt,seed,num_inference_steps\r\n"a cat, big",7,\r\n"two\nlines",,30\r\n')
    first, second = read(path, num_inference_steps=12)
    assert (first.prompt, first.seed, first.num_inference_steps) == ("a cat, big", 7, 12)
    assert (second.prompt, second.num_inference_steps) == ("two\nlines", 30)


def test_csv_says_true_and_false_in_words_and_numbers(file) -> None:
    table = "prompt,trajectory,deterministic,clip_skip,eta\na,true,1,2,0.5\nb,false,0,,\nc,,,,\n"
    assert complaints(file("bad.csv", table + "d,,yup,,\n"))[0].startswith("bad.csv:5: deterministic: ")
    path = file("p.csv", table)
    made = [(spec.trajectory, spec.deterministic, spec.clip_skip, spec.eta) for spec in read(path)]
    assert made == [(True, True, 2, 0.5), (False, False, None, 0.0), (False, False, None, 0.0)]
    # A cell takes precedence over the command line's value for all rows.
    assert [spec.trajectory for spec in read(path, trajectory=True)] == [True, False, True]


def test_jsonl_lines_are_objects_or_prompts(file) -> None:
    path = file("p.jsonl", '{"prompt": "a cat", "seed": 1}\n\n"a dog"\n')
    assert [spec.prompt for spec in read(path)] == ["a cat", "a dog"]


def test_every_error_has_its_file_and_line(file) -> None:
    csv = file("p.csv", 'prompt,seed,width\na,1,64\nb,x,65\n"c\nc",1,64\nd,1,64,9\ne,-1,\n')
    jsonl = file("p.jsonl", '{"prompt": 5}\n[1]\n{nonsense\n{"prompt": "ok", "sede": 1}\n')
    found = complaints(csv, jsonl, "gone.txt")
    assert [line.split(": ")[0] for line in found] == [
        "p.csv:3",
        "p.csv:3",
        "p.csv:6",
        "p.csv:7",
        "p.jsonl:1",
        "p.jsonl:2",
        "p.jsonl:3",
        "p.jsonl:4",
        "gone.txt",
    ]
    assert "width" in found[0]
    assert "seed" in found[1]
    assert "no such file" in found[-1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("text\na\n", "no column `prompt`"),
        ("prompt,colour\na,red\n", "p.csv:1: colour: no such column"),
        ("prompt,seed,seed\na,1,2\n", "names a column twice"),
        ("", "no column `prompt`"),
        ('prompt\n"never closed\n', "is not CSV"),
        (b"prompt\nok\n\xff\xfe\n", "p.csv:3: prompt: is not UTF-8"),
    ],
)
def test_a_csv_that_can_not_be_read_says_why(file, data: str | bytes, said: str) -> None:
    assert said in "\n".join(complaints(file("p.csv", data)))


def test_a_folder_and_a_file_without_permission_are_errors_not_tracebacks(file, tmp_path: Path) -> None:
    Path("d.txt").mkdir()
    assert "can't be read" in complaints("d.txt")[0]


def test_whole_specs_keep_their_values_over_defaults() -> None:
    spec = RenderSpec(prompt="a", num_inference_steps=5)
    assert next(sources.specs([spec, "b", {"prompt": "c"}], {"num_inference_steps": 9})) is spec
    assert [made.num_inference_steps for made in sources.specs([spec, "b"], {"num_inference_steps": 9})] == [5, 9]


def nested() -> list[object]:
    made: list[object] = []
    for _ in range(10_000):
        made = [made]
    return made


@pytest.mark.parametrize("field", list(RenderSpec.model_fields))
@pytest.mark.parametrize("value", [10**5000, -(10**5000), nested(), object(), float("nan")], ids=range(5))
def test_a_value_that_can_not_even_be_shown_is_a_problem(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match="spec 1: ") as caught:
        list(sources.specs([{"prompt": "a", field: value}], {}))
    assert caught.value.problems


def test_problems_of_an_iterable_name_the_spec_by_number() -> None:
    with pytest.raises(InvalidInput, match="spec 2: seed"):
        list(sources.specs(["fine", {"prompt": "a", "seed": -1}], {}))


def test_what_a_check_says_of_a_spec_stands_among_the_other_problems() -> None:
    def check(spec: RenderSpec, where: str) -> Problem | None:
        return Problem(where, "scheduler", "no good") if spec.scheduler == "ddim" else None

    given = [{"prompt": "a", "scheduler": "ddim"}, {"prompt": "b", "seed": -1}, {"prompt": "c", "scheduler": "euler"}]
    with pytest.raises(InvalidInput) as caught:
        list(sources.specs(given, {}, check))
    first, second = map(str, caught.value.problems)
    assert first == "spec 1: scheduler: no good"
    assert second.startswith("spec 2: seed: ")


def test_specs_leave_one_by_one_and_none_is_held() -> None:
    read = []

    def prompts():
        for number in range(3):
            read.append(number)
            yield f"prompt {number}"

    stream = sources.specs(prompts(), {})
    assert read == []
    assert [(next(stream).prompt, list(read)) for _ in range(2)] == [("prompt 0", [0]), ("prompt 1", [0, 1])]


def test_a_long_file_takes_no_more_memory_than_a_short_one(file) -> None:
    path = file("p.csv", "prompt,seed\n" + "".join(f'"a long prompt, number {n}",{n}\n' for n in range(20_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.specs(path, {"num_inference_steps": 5})) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_after_the_first_problem_nothing_comes_but_all_rows_are_checked() -> None:
    stream = sources.specs(["a", {"seed": -1}, "b", {"prompt": 5}], {})
    assert next(stream).prompt == "a"
    with pytest.raises(InvalidInput) as caught:
        next(stream)
    assert [problem.where for problem in caught.value.problems] == ["spec 2", "spec 2", "spec 4"]


def test_of_very_many_problems_the_first_thousand_are_said_and_the_rest_counted() -> None:
    with pytest.raises(InvalidInput) as caught:
        list(sources.specs(({"prompt": 5} for _ in range(13_345)), {}))
    *said, more = caught.value.problems
    assert (len(said), str(said[-1]).split(":")[0], str(more)) == (1000, "spec 1000", "… and 12,345 more")


def test_no_rows_are_nothing_to_render(file) -> None:
    for nothing in ([], file("p.txt", "# only a comment\n"), file("p.csv", "prompt\n")):
        with pytest.raises(InvalidInput, match="there is nothing to render"):
            list(sources.specs(nothing, {}))


def test_paths_stand_among_prompts_and_one_thing_stands_alone(file) -> None:
    path = file("p.txt", "b\nc\n")
    assert [spec.prompt for spec in sources.specs(["a", path, {"prompt": "d"}], {})] == ["a", "b", "c", "d"]
    for one in ("a", {"prompt": "a"}, RenderSpec(prompt="a"), file("q.txt", "a")):
        assert [spec.prompt for spec in sources.specs(one, {})] == ["a"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.txt", b"ok\ncaf\xe9\n", "p.txt:2: prompt: is not UTF-8"),
        ("p.txt", b"a\rb\r", "p.txt:1: prompt: has a carriage return inside"),
        ("p.txt", "a\n".encode("utf-16"), "p.txt:1: is UTF-16; save the file as UTF-8"),
        ("p.txt", b"x" * (1 << 21), "p.txt:1: is longer than 1 MiB"),
        ("p.csv", b"prompt,negative_prompt\nok,\nok,\xff\n", "p.csv:3: negative_prompt: is not UTF-8"),
        ("p.csv", b"prompt,caf\xe9\nok,\n", "p.csv:1: is not UTF-8"),
        ("p.csv", 'prompt\n"' + "x" * 200_000 + '"\n', "p.csv:2: is not CSV: field larger than field limit"),
        ("p.jsonl", b'"ok"\n"caf\xe9"\n', "p.jsonl:2: is not UTF-8"),
        ("p.jsonl", "[" * 100_000, "p.jsonl:1: is not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": [1]}', "p.jsonl:1: seed: should be text, a number, true, false or null"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "p.jsonl:1: is not JSON"),
    ],
)
def test_what_can_not_be_read_is_told_with_its_line_and_column(file, name: str, data: str | bytes, said: str) -> None:
    (found,) = complaints(file(name, data))
    assert found.startswith(said)


def test_bad_bytes_in_one_row_do_not_hide_the_problems_of_the_next(file) -> None:
    path = file("p.csv", b"prompt,seed\n\xff,1\n\xe9,x\nok,-1\n")
    assert [line[:13] for line in complaints(path)] == ["p.csv:2: prom", "p.csv:3: prom", "p.csv:4: seed"]
