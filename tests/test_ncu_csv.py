"""The parser, on a real capture of an H100 and on what becomes of one."""

from __future__ import annotations

import csv
import io
import random
import re

import pytest

from chela_bench.errors import RecordError
from chela_bench.profiles import ncu
from chela_bench.profiles.ncu_csv import merged, parse, with_detail
from chela_bench.records import Kernel
from tests.fake_ncu import CAPTURE, COLUMN, table

TEXT = CAPTURE.read_text()
ALL = (*ncu.BYTES, *ncu.DETAIL, *ncu.LAUNCH)


def rewritten(change):
    """The capture with every row changed: a list of cells in, a list of cells out."""
    lines = TEXT.splitlines()
    rows = [change(row) for row in csv.reader(io.StringIO("\n".join(lines[3:])))]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return "\n".join([*lines[:3], out.getvalue()])


def test_a_real_capture():
    capture = parse(TEXT, ALL)
    assert capture.missing == () and not capture.torn
    names = [launch.kernel.name for launch in capture.launches]
    assert names == ["chunk_fwd_kernel_h", "chunk_fwd_kernel_o", "seg_state", "seg_out"]
    assert {launch.point for launch in capture.launches} == {None}  # its range had no number
    assert capture.launches[3].kernel == Kernel(
        name="seg_out",
        grid="(2, 4, 16)",
        threads=128,
        time_ns=29152,
        read_bytes=53_500_672,
        write_bytes=8_400_384,
        l2_bytes=109_831_808,
        l2_hit_pct=28.77,
        regs=196,
        smem_static_bytes=0,
        smem_dynamic_bytes=139_264,
        local_load_instructions=0,
        local_store_instructions=0,
        tensor_instructions=229_376,
        bank_conflicts=98_993,
        occupancy_pct=6.25,
        occupancy_limit_pct=6.25,
        limiters=["shared memory"],
        waves=0.97,
        passes=3,
    )
    assert capture.launches[0].kernel.limiters == ["registers", "shared memory"]  # 5 blocks each


def test_reordered_columns_are_the_same():
    order = list(range(len(TEXT.splitlines()[3].split('","'))))
    random.Random(7).shuffle(order)
    order.remove(0)
    shuffled = rewritten(lambda row: [row[n] for n in (0, *order)])
    assert shuffled != TEXT
    assert parse(shuffled, ALL) == parse(TEXT, ALL)


@pytest.mark.parametrize(
    ("thousands", "decimal"), [(".", ","), ("\u202f", ","), (" ", ","), ("'", "."), ("", ".")]
)
def test_localised_numbers_are_the_same(thousands, decimal):
    def local(cell):
        if not re.fullmatch(r"[\d,]+(\.\d+)?", cell):
            return cell
        return cell.translate({ord(","): thousands, ord("."): decimal})

    assert parse(rewritten(lambda row: [local(cell) for cell in row]), ALL) == parse(TEXT, ALL)


def test_two_ways_of_writing_numbers_are_refused():
    assert '"51.36"' in TEXT
    with pytest.raises(RecordError, match="decimal points and with decimal commas"):
        parse(TEXT.replace('"51.36"', '"51,36"', 1))


def test_scaled_units_are_undone():
    def scaled(row):
        name = "dram__bytes_read.sum"
        at = header.index(name)
        if row[at] == "byte":
            row[at] = "Mbyte"
        elif row[at] != name:
            row[at] = f"{int(row[at].replace(',', '')) / 1e6:,.6f}"
        return row

    header = next(csv.reader([TEXT.splitlines()[3]]))
    assert parse(rewritten(scaled), ALL) == parse(TEXT, ALL)


@pytest.mark.parametrize("keep", [0.98, 0.95, 0.9])
def test_a_torn_capture_says_so_and_loses_its_last_point(keep):
    text = table(["chela-0", "chela-late-0", "chela-1", "chela-late-1"])
    whole, torn = parse(text), parse(text[: int(len(text) * keep)])
    assert set(whole.by_point()) == {0, 1} and not whole.torn
    assert torn.torn and len(torn.launches) < len(whole.launches)
    assert torn.launches == whole.launches[: len(torn.launches)]
    assert torn.by_point() == {0: whole.by_point()[0]}


def test_every_cut_is_torn_or_the_same():
    """Wherever a kill cuts the last rows: never another number than the whole has."""
    text = table(["chela-0", "chela-1"])
    whole = parse(text)
    start = text.rindex("\n", 0, -2)
    for end in range(start + 1, len(text), 7):
        cut = parse(text[:end])
        assert cut.launches == whole.launches[: len(cut.launches)]
        assert cut.torn or len(cut.launches) in (len(whole.launches), len(whole.launches) - 1)


def test_a_number_that_is_cut_is_no_number():
    """`"53,500,672"` cut to `"53,50` in the last cell of the last row."""
    header = next(csv.reader([TEXT.splitlines()[3]]))
    at = header.index(ncu.READ)
    text = rewritten(lambda row: [*row[:at], *row[at + 1 :], row[at]])
    end = text.rindex('"53,500,672"') + len('"53,50')
    cut = parse(text[:end])
    assert cut.torn and [launch.kernel.name for launch in cut.launches][-1] == "seg_state"


def test_a_row_that_lacks_cells_in_the_middle_is_refused():
    lines = TEXT.splitlines()
    lines[6] = lines[6].rpartition(',"')[0]
    with pytest.raises(RecordError, match=r"row 3 .* has 311 cells; its header has 312"):
        parse("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty text"),
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user\n", "as root"),
        ("==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        ("==ERROR== Unknown metric foo\n", "ncu says: Unknown metric foo"),
        ("hello, world", "'hello, world'"),
        ('"ID","Kernel Name","Metric Name","Metric Value"\n', "raw page was wanted"),
        ('"ID","Process ID"\n', "raw page was wanted"),
    ],
)  # fmt: skip
def test_what_is_no_capture_is_refused_with_a_reason(text, said):
    with pytest.raises(RecordError, match=re.escape(said)):
        parse(text)


def test_a_table_without_rows_is_an_empty_capture():
    assert parse("\n".join(TEXT.splitlines()[3:5]) + "\n").launches == ()
    assert parse(TEXT.splitlines()[3] + "\n").launches == ()


@pytest.mark.parametrize("length", [10, 3000, 16000])
def test_a_capture_that_ends_in_its_header_is_cut_off(length):
    header = TEXT.splitlines()[3]
    for cut in (header[:length], header):
        with pytest.raises(RecordError, match="the capture is cut off in its first line"):
            parse(cut)


def test_a_unit_that_is_not_known_is_named():
    """Of what is counted in bytes or time; a warp by any other name is as many."""
    other = TEXT.splitlines()[4]
    for unit, metric in (("byte", ncu.READ), ("ns", ncu.TIME), ("byte/block", "launch__shared")):
        units = other.replace(f'"{unit}"', '"parsec"')
        with pytest.raises(RecordError, match=rf"{metric}\S* is in 'parsec'; units of it are: "):
            parse(TEXT.replace(other, units))
    units = other.replace('"inst"', '"parsec"').replace('"warp"', '"parsec"')
    assert parse(TEXT.replace(other, units)) == parse(TEXT)
    with pytest.raises(RecordError, match="'parsec/block'"):
        parse(TEXT.replace("byte", "parsec"))


@pytest.mark.parametrize("value", ["-5", "about 7", "inf"])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(RecordError, match=r"dram__bytes_read\.sum should be a"):
        parse(TEXT.replace('"33,564,672"', f'"{value}"'))


def test_missing_columns_are_named_and_empty():
    names = TEXT.splitlines()[3].replace("lts__t_bytes.sum", "lts__t_bytes.total")
    capture = parse(TEXT.replace(TEXT.splitlines()[3], names), ALL)
    assert capture.missing == ("lts__t_bytes.sum",)
    assert [launch.kernel.l2_bytes for launch in capture.launches] == [None] * 4


def test_points_come_from_their_ranges_and_late_writes_stand_apart():
    capture = parse(table(["chela-begin", "chela-3", "chela-late-3", "chela-12"]))
    assert len(capture.launches) == 6
    assert list(capture.by_point()) == [3, 12]
    assert [kernel.name for kernel in capture.by_point()[3]] == ["seg_state", "seg_out"]
    assert capture.late_bytes() == {3: 1 << 20}


def test_another_range_is_no_point():
    row = f'753  "<default domain>:not-chela-3:none"  "<default domain>:chela-{"x"}:none" '
    header = next(csv.reader([TEXT.splitlines()[3]]))
    assert COLUMN in header
    text = rewritten(lambda cells: [row if header[n] == COLUMN and cells[0] not in ("", "ID") else c
                                    for n, c in enumerate(cells)])  # fmt: skip
    assert {launch.point for launch in parse(text).launches} == {None}


def test_launches_of_one_kernel_are_one_row():
    one = Kernel(name="k", grid="(1, 1, 1)", time_ns=10, read_bytes=5, l2_hit_pct=50.0, passes=1)
    other = one.model_copy(update={"time_ns": 30, "l2_hit_pct": 90.0, "passes": 2})
    wider = one.model_copy(update={"grid": "(2, 1, 1)"})
    first, second = merged([one, other, wider])
    assert (first.launches, first.time_ns, first.read_bytes, first.passes) == (2, 40, 10, 2)
    assert first.l2_hit_pct == pytest.approx(80.0)  # by time
    assert first.write_bytes is None and first.bank_conflicts is None
    assert second == wider


def test_detail_joins_kernels_that_are_alike():
    kernel = Kernel(name="k", grid="(1, 1, 1)", read_bytes=5, regs=32)
    detail = Kernel(name="k", grid="(1, 1, 1)", read_bytes=4, regs=32, l2_bytes=9)
    other = detail.model_copy(update={"regs": 40})
    assert with_detail([kernel], [detail])[0] == kernel.model_copy(update={"l2_bytes": 9})
    assert with_detail([kernel], [other]) == [kernel]
