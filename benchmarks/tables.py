"""The table of each kind of case in a report, and what it says of losses."""

from __future__ import annotations

from .figures import ALONE, FIRST, REPACKED, SDPA, WARM, Case, Estimate, estimate, fastest, speed

COMPARED = ("dense", "dense_fused", "mask_only", "slice")
DENSE = ("dense", "dense_fused")
GENERATED = ("dense", "mask_only", *REPACKED, WARM, f"{WARM}_requests")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shape_of(case: Case) -> str:
    """The input in words, for example `8x128` or `32x20 demo`."""
    return f"{case['batch']}x{case['tokens']} {case['label']}".strip()


def standing(found: Estimate) -> str:
    """How a speed relative to repacked stands to 1, by its whole interval."""
    return "slower" if found.high < 1 else "faster" if found.low > 1 else "even"


def median(case: Case, name: str) -> float:
    """Median time of a candidate in microseconds."""
    return case["candidates"][name]["median"]


def fastest_text(case: Case, names: tuple[str, str]) -> str:
    """Microseconds of the faster of two candidates, and whether it is the fused one."""
    name = fastest(case, names)
    return f"{median(case, name):.0f}{' fused' if name.endswith('_fused') else ''}"


def over(case: Case, name: str, *others: str) -> str:
    """A candidate's speed relative to the fastest of others, with its interval."""
    return str(estimate(speed(case, name, others)))


def over_value(case: Case, name: str, other: str) -> str:
    """A candidate's speed relative to another, where both were timed."""
    known = name in case["candidates"] and other in case["candidates"]
    return f"{median(case, other) / median(case, name):.2f}" if known else ""


def names_of(cases: list[Case]) -> str:
    """The cases by name."""
    return ", ".join(f"`{case['name']}`" for case in cases) or "none"


def block_table(cases: list[Case]) -> str:
    """One row a case: times of the limit, of ours and of `set_heads`, and everyone's speed relative to the limit."""
    rows = []
    for case in cases:
        ours = estimate(speed(case, WARM))
        rows.append(
            [str(case["hidden"]), shape_of(case), str(case["kept_count"])]
            + [fastest_text(case, REPACKED), f"{median(case, WARM):.0f}"]
            + [str(ours), standing(ours), f"{estimate(speed(case, FIRST)).value:.2f}"]
            + [f"{estimate(speed(case, other)).value:.2f}" for other in COMPARED]
            + [f"{median(case, 'set_heads'):.0f}"]
        )
    header = ["E", "B x T", "heads", "repacked us", "ours us", "ours [95 % interval]", "", "first call"]
    return table([*header, *COMPARED, "set_heads us"], rows)


def model_table(cases: list[Case]) -> str:
    """One row a case: milliseconds of everyone, the ceiling with attention free, and speed over dense."""
    names = (*COMPARED, "repacked", "repacked_fused", WARM, FIRST, "ceiling")
    rows = []
    for case in cases:
        dense = median(case, "dense")
        rows.append(
            [str(case["hidden"]), shape_of(case), f"{case['kept_count']} of {case['heads']}"]
            + [f"{median(case, name) / 1000:.2f}" for name in names]
            + [str(estimate(speed(case, WARM))), f"{dense / median(case, WARM):.2f}"]
            + [f"{dense / median(case, 'ceiling'):.2f}"]
        )
    header = ["E", "B x T", "heads", *(f"{name} ms" for name in names)]
    return table([*header, "ours over repacked", "ours over dense", "ceiling over dense"], rows)


def block_losses(cases: list[Case]) -> str:
    """In how many cases ours loses to the repacked and to the dense block; the latter by name."""
    slower = [case for case in cases if standing(estimate(speed(case, WARM))) == "slower"]
    behind = [case for case in cases if median(case, WARM) > median(case, fastest(case, DENSE))]
    text = f"Slower than the repacked block, by the whole interval: {len(slower)} of {len(cases)} cases. "
    return text + f"Slower than the faster of the two dense blocks: {names_of(behind)}."


def requests_table(cases: list[Case]) -> str:
    """One row a case: times of dense, ours and everyone alone, and speeds relative to these."""
    rows = []
    for case in cases:
        rows.append(
            [str(case["hidden"]), shape_of(case), f"{case['kept_count']} of {case['heads']}"]
            + [f"{median(case, 'dense'):.0f}", f"{median(case, WARM):.0f}", fastest_text(case, ALONE)]
            + [over(case, WARM, "dense"), over(case, WARM, *ALONE), over_value(case, FIRST, "dense")]
            + [over_value(case, WARM, "ours_shared")]
            + [over_value(case, other, "dense") for other in ("dense_fused", "mask_only", "reference")]
            + [f"{median(case, 'set_heads'):.0f}"]
        )
    header = ["E", "B x T", "on", "dense us", "ours us", "alone us", "ours over dense [95 % interval]"]
    header += ["ours over alone [95 % interval]", "first call over dense", "ours over shared", "fused over dense"]
    return table([*header, "mask-only over dense", "reference over dense", "set_heads us"], rows)


def requests_losses(cases: list[Case]) -> str:
    """In which cases ours loses to the faster dense block, and in how many to every request by itself."""
    behind = [case for case in cases if median(case, WARM) > median(case, fastest(case, DENSE))]
    slower = [case for case in cases if standing(estimate(speed(case, WARM, ALONE))) == "slower"]
    text = f"Slower than every request by itself, by the whole interval: {len(slower)} of {len(cases)} cases. "
    return text + f"Slower than the faster of the two dense blocks: {names_of(behind)}."


def gqa_table(cases: list[Case]) -> str:
    """One row a case: times with all heads on and of ours, and speeds relative to all on."""
    rows = []
    for case in cases:
        rows.append(
            [f"{case['num_heads']}/{case['kv_heads']} of {case['head_dim']}", shape_of(case)]
            + [f"{median(case, name):.0f}" for name in (WARM, "all_on", "no_mask", *SDPA, "sliced", "alone")]
            + [over(case, WARM, "all_on"), over(case, WARM, *SDPA), over(case, WARM, "sliced")]
        )
    header = ["heads", "B x T", *(f"{name} us" for name in ("ours", "all on", "no mask", *SDPA, "sliced", "alone"))]
    relative = ("all on", "the faster SDPA", "sliced")
    return table([*header, *(f"ours over {name} [95 % interval]" for name in relative)], rows)


def gqa_losses(cases: list[Case]) -> str:
    """In which cases ours loses to PyTorch's SDPA with all heads on, or sliced."""
    behind = [case for case in cases if median(case, WARM) > median(case, fastest(case, SDPA))]
    slower = [case for case in cases if standing(estimate(speed(case, WARM, ["sliced"]))) == "slower"]
    text = f"Slower than the faster SDPA with all heads on: {names_of(behind)}. "
    return text + f"Slower than SDPA on sliced heads, by the whole interval: {names_of(slower)}."


def bandwidth(case: Case, name: str) -> float:
    """Gigabytes of the cache that a candidate needs, per second."""
    size = case["kept_bytes"] if name == WARM else case["all_bytes"]
    return size / median(case, name) / 1000


def decode_table(cases: list[Case]) -> str:
    """One row a case: times, bandwidths over the bytes that are needed, and speeds relative to all on."""
    timed_names, rated = (WARM, "all_on", "no_mask", "sdpa", "read"), (WARM, "all_on", "sdpa", "read")
    rows = []
    for case in cases:
        shape = f"{case['num_heads']}/{case['kv_heads']} of {case['head_dim']} {case['dtype']}"
        lengths = " uneven" if min(case["lengths"]) < case["tokens"] else ""
        pages = f" pages of {case['page_size']}" if case["page_size"] else ""
        rows.append(
            [shape, f"{shape_of(case)}{lengths}{pages}", f"{case['kept_count']} of {case['heads']}"]
            + [f"{median(case, name):.0f}" for name in timed_names]
            + [f"{bandwidth(case, name):.1f}" for name in rated]
            + [over(case, WARM, "all_on"), f"{case['all_bytes'] / case['kept_bytes']:.2f}"]
            + [over(case, "all_on", "sdpa"), over(case, "all_on", "read")]
        )
    header = ["heads", "B x cache", "on", *(f"{name} us" for name in timed_names)]
    header += [*(f"{name} GB/s" for name in rated), "ours over all on [95 % interval]", "bytes allow"]
    return table([*header, "all on over SDPA [95 % interval]", "all on over read [95 % interval]"], rows)


def decode_losses(cases: list[Case]) -> str:
    """In which cases ours loses to SDPA with all heads on, whatever is on in ours."""
    behind = [case for case in cases if median(case, "all_on") > median(case, "sdpa")]
    return f"With all heads on slower than SDPA: {names_of(behind)}."


def generate_table(cases: list[Case]) -> str:
    """One row a case and candidate: milliseconds of the call, per new token and in attention; speeds over dense."""
    rows = []
    for case in cases:
        shape = f"{case['batch']}x{case['tokens']}+{case['new_tokens']}"
        for name in (each for each in GENERATED if each in case["candidates"]):
            parts = (name, f"{name}_attention", f"{name}_attention_prefill", f"{name}_attention_decode")
            whole, *attention = (median(case, part) / 1000 for part in parts)
            rows.append(
                [shape, name, f"{whole:.0f}", f"{whole / case['new_tokens']:.2f}", *(f"{ms:.0f}" for ms in attention)]
                + [over(case, f"{name}_attention", "dense_attention"), over(case, name, "dense")]
                + [over_value(case, part, part.replace(name, "dense", 1)) for part in parts[2:]]
            )
    header = ["B x prompt + new", "candidate", "call ms", "ms per new token", "attention ms", "of it prompt ms"]
    header += ["of it decoding ms", "attention over dense [95 % interval]", "call over dense [95 % interval]"]
    return table([*header, "prompt attention over dense", "decoding attention over dense"], rows)


def gates_table(cases: list[Case]) -> str:
    """One row a case and candidate of ours: milliseconds of dense and of ours, and time over dense."""
    rows = []
    for case in cases:
        for name in (each for each in (WARM, f"{WARM}_loss") if each in case["candidates"]):
            time = estimate(1 / speed(case, name, ["dense"]))
            rows.append(
                [str(case["hidden"]), str(case["layers"]), str(case["feed_forward"]), shape_of(case), name]
                + [f"{median(case, each) / 1000:.1f}" for each in ("dense", name)]
                + [str(time), f"{1 / time.value:.2f}"]
            )
    header = ["E", "layers", "feed-forward", "B x T", "candidate", "dense ms", "ours ms"]
    return table([*header, "time over dense [95 % interval]", "speed over dense"], rows)
