"""Instruction counts: what a dump of callgrind says, what counts as changed, and one count for real."""

import json
import shutil

import pytest

pytest.importorskip("rich")

from bench import instructions
from bench.instructions import Count, Counts, Uncountable, count, load, main, small_cases, verdict

pytestmark = pytest.mark.compiled

# callgrind's format: a function's own lines, a call with the cost of the callee, the allocator
DUMP = """# callgrind format
version: 1
desc: Trigger: --dump-before=boxer<std::string (), &convrnn::isa_report>::boxed_fn(unsigned long*)

positions: line
events: Ir

ob=/lib/_C.abi3.so
fn=convrnn::(anonymous namespace)::mingru(torch::stable::Tensor const&)
0 100
fi=other.h
7 20
cfn=_int_malloc
calls=3 0
0 5000
fe=mingru.cpp
9 3

fn=_int_malloc
0 5000

fn=malloc_consolidate
0 70

fn=freeze_and_mmap_nothing
0 4000

totals: 9193
"""


def a_count(n: int) -> Count:
    return Count("case", "forward", n, 10)


@pytest.fixture
def counted(monkeypatch):
    """Sets what a run counts, in place of valgrind."""

    def set_to(n: int) -> None:
        monkeypatch.setattr(instructions, "count", lambda cases: Counts("avx2:plain,avx2", "2", "3", [a_count(n)]))

    return set_to


def test_a_dump_counts_once_and_without_the_allocator():
    assert instructions.instructions(DUMP) == 100 + 20 + 3 + 4000


@pytest.mark.parametrize("dump", ["", "events: Ir Dr Dw\nfn=f\n0 1 2 3\n"])
def test_another_dump_is_refused(dump):
    with pytest.raises(ValueError, match="Ir"):
        instructions.instructions(dump)


@pytest.mark.parametrize(
    "now, before, expected",
    [(1010, 1000, "same"), (1011, 1000, "more"), (990, 1000, "same"), (989, 1000, "fewer"), (1, None, "new")],
)
def test_verdict(now, before, expected):
    assert verdict(a_count(now), before and a_count(before)) == expected


def test_the_least_call_of_a_pass_counts_and_its_preparation_does_not(tmp_path):
    for number, cost in enumerate([1, 50, 40, 60, 2, 9, 8, 7], 1):  # two passes: a preparation, three calls
        (tmp_path / f"dump.{number}").write_text(f"events: Ir\nfn=f\n0 {cost}\n")
    assert [instructions.least(tmp_path, number) for number in range(2)] == [40, 7]
    with pytest.raises(Uncountable, match="stripped"):
        instructions.least(tmp_path, 2)


def test_only_a_grown_count_fails(counted, tmp_path, capsys):
    saved = tmp_path / "counts.json"
    counted(1000)
    assert main(["--save", str(saved)]) == 0
    assert load(saved).find("case", "forward") == a_count(1000)
    for now, status, word in [(1000, 0, "1 same"), (900, 0, "1 fewer"), (1100, 1, "1 more")]:
        counted(now)
        assert main(["--compare", str(saved)]) == status
        assert word in capsys.readouterr().out


def test_counts_of_other_kernels_are_pointed_out(counted, tmp_path, capsys):
    saved = tmp_path / "counts.json"
    Counts("plain:plain", "2", "3", [a_count(1000)]).save(saved)
    counted(1000)
    main(["--compare", str(saved)])
    assert "another isa: plain:plain" in capsys.readouterr().out


def test_without_valgrind_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main([]) == 2
    assert "apt install valgrind" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", json.dumps({"rows": []})])
def test_a_file_that_holds_no_counts_is_refused(content, tmp_path, capsys):
    path = tmp_path / "counts.json"
    if content is not None:
        path.write_text(content)
    assert main(["--compare", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_no_case_is_an_error(capsys):
    assert main(["--only", "nothing is called so"]) == 2
    assert "mingru" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_case_is_counted():
    (case,) = (case for case in small_cases() if case.name == "mingru (4, 128, 256) float32")
    found = count([case])
    assert [(row.what, row.elements) for row in found.counts] == [("forward", 131072), ("backward", 131072)]
    # no fewer than the vectors' loads and stores, no more than scalar code
    assert all(1 < row.per_element < 200 for row in found.counts)


def test_every_small_case_can_be_prepared():
    prepared = [(case.name, what, elements) for case, what, _, elements in instructions.passes(list(small_cases()))]
    assert len(prepared) == 20
    assert all(elements > 0 for _, _, elements in prepared)
