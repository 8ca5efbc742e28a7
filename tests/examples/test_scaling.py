"""The formulas of the scaling page, against programs and against sums by hand."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def script(benchmark_script):
    return benchmark_script("scaling")


def check(script, name, optimiser, exchange):
    row = script.check(name, script.SMALL[name], optimiser, 8)
    # Besides, the program holds a few scalars.
    assert row["held"] <= row["held, XLA"] <= row["held"] + 1024
    assert row["MFLOP, XLA"] == row["MFLOP"]
    assert row["temporary, XLA"] <= row["temporary"]
    # An entry of each matrix that `schedule_free` keeps costs its row: an m-th of it.
    assert row["received"] <= row["received, XLA"] <= exchange * row["received"]


def test_formulas_are_those_of_a_program(script):
    check(script, "uneven", "SF-NorMuon", 1.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_formulas_of_states_in_few_bits_are_those_of_a_program(script, dtype):
    row = script.check("uneven", script.SMALL["uneven"], "SF-NorMuon", 8, dtype)
    # Besides, the program holds a few scalars.
    assert row["held"] <= row["held, XLA"] <= row["held"] + 1024
    # The sum of momentum and gradient, which fp32 writes over the old momentum.
    network = script.SMALL["uneven"]
    assert row["temporary, XLA"] <= row["temporary"] + 4 * network.matrices / 8


@pytest.mark.exhaustive
def test_formulas_are_those_of_another_program(script):
    check(script, "even", "SF-NorMuon", 1.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_formulas_of_the_full_set_are_those_of_a_program(script, name):
    row = script.check(name, script.SMALL[name], "full set", 8)
    # KL-Shampoo's state is divided: on every device it would be 3e5 bytes and more.
    assert row["held"] <= row["held, XLA"] <= row["held"] + 1024
    assert row["temporary, XLA"] <= row["temporary"]
    # As for SF-NorMuon: a row of each matrix.
    assert row["received"] <= row["received, XLA"] <= 1.1 * row["received"]
    # A whole renewal of a basis stands in the program, by Gram-Schmidt.
    assert row["MFLOP"] <= row["MFLOP, XLA"] <= 1.3 * row["MFLOP"]


def test_bytes_of_a_large_network(script):
    """By hand, of a transformer of 10 billion on 8 devices."""
    network = script.model.NETWORKS["transformer 10 B"]
    matrices, table = 12 * 32 * 5120**2, 32768 * 5120
    norms, neurons = 2 * 32 * 5120, 32 * (3 + 1 + 4 + 1) * 5120
    plain = script.model.cost(network, script.model.SF_NORMUON, 8)
    full = script.model.cost(network, script.model.FULL_SET, 8)
    assert plain.parameters == plain.gradients == (matrices + table + norms) / 2
    rest = 12 * (table + norms)
    assert plain.state == (8 * matrices + rest) / 8 + 4 * neurons
    # Both sides of the square matrices, the shorter one of the three others.
    a_side = 5121 * 2560 + 5120**2 + 5120
    assert full.state - plain.state == 4 * (matrices + 32 * 5 * a_side) / 8
    # Rows of 3, 1, 4 and 1 times 5120: 128 blocks of 120, else blocks of 80.
    blocks = 32 * 5120 * (128 + 64 + 256 + 4 * 64)
    narrow = script.model.held_state(network, script.model.SF_NORMUON, 8, "int8")
    held = (5 * matrices + 4 * blocks + 8 * (table + norms)) / 8 + 4 * neurons
    assert narrow == held


def test_the_page_has_the_tables_of_the_script(script, capsys):
    rows = script.main([])["rows"]
    assert len(rows) == 6 * 3
    printed = capsys.readouterr().out
    page = (SCRIPTS.parents[1] / "docs" / "scaling.md").read_text()
    states = script.state_table()
    for given, columns in (
        *((rows, columns) for columns in (script.COSTS, script.TIMES)),
        (states, script.STATES),
    ):
        assert script.markdown(given, columns) in printed
        assert script.markdown(given, columns) in page


LOOP = """
HloModule m

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %d = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%c, body=%body, TRIPS
  %g = f32[32,8]{1,0} all-gather(%a), replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def test_loops_are_counted_as_often_as_they_run(script):
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    text = LOOP.replace("condition=%c, ", "")
    program = script.programs.read(text.replace("TRIPS", known))
    assert program.flops == 5 * 2 * 4 * 4 * 8
    assert program.unknown_loops == 0
    # Seven parts of eight come from others.
    assert program.received == {"all-gather": 4 * 32 * 8 * 7 / 8}
    assert script.programs.read(text.replace("TRIPS", "x=y")).unknown_loops == 1
