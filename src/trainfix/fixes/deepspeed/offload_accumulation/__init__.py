"""ZeRO-1 and ZeRO-2 with CPU offload: every micro-batch reaches the optimizer, once, and nothing of earlier windows.

Repairs TF-0001, TF-0003, TF-0004, TF-0009 and TF-0013.

TF-0001: deepspeed#6550 (0.15.2) made `async_accumulate_grad_in_cpu_via_gpu` either add the host buffer to the gradient
or copy the gradient into the buffer, so the sums of the middle micro-batches were thrown away.
TF-0003: `copy_grads_in_partition` keeps nothing between micro-batches when the engine's accumulation steps are 1, as
when the caller drives `set_gradient_accumulation_boundary`; present since 0.14 at least.
Both were fixed by #7967 and #7981 (0.19.0).
TF-0004: what a parameter's buffer holds is copied to the master gradient only if the parameter has a gradient in the
last micro-batch; the buffer is emptied, and begun anew, only in the first. Since 0.14 at least, not fixed.
TF-0009: the buffer and the sum have the parameter's 16 bits. Since 0.14 at least, not fixed.
TF-0013: #7981 (0.19.0) lets every `backward` but the first add the buffer, also where each is a boundary.

What we do instead: each micro-batch's slice of this rank's partition goes straight into DeepSpeed's own float32 master
gradient on the host: the first touch in a window stores, later ones add. A window that DeepSpeed's own code sums
rightly is left to that code, bit for bit; there we only empty what it would add from an earlier window, and at the end
of the last micro-batch move what it would leave behind. What a window does not touch is zeroed.

Delete what serves TF-0001 and TF-0003 when no supported framework pins a DeepSpeed older than 0.19.0; the rest when
DeepSpeed keeps such parameters.
"""

from __future__ import annotations

from trainfix.engine.contract import Fix, Guard, Target
from trainfix.fixes.deepspeed.offload_accumulation import carriers, reached, window
from trainfix.fixes.deepspeed.offload_accumulation.repair import OPTIMIZER, build
from trainfix.fixes.deepspeed.offload_accumulation.state import repairs


def _target(name: str, *shapes: str, may_be_replaced: bool = False) -> Target:
    return Target(OPTIMIZER + name, frozenset(shapes), may_be_replaced)


# Shapes of the releases 0.14.0 to 0.19.8; the comment is the first release that has each.
FIX = Fix(
    name="deepspeed.offload_accumulation",
    package="deepspeed",
    advisories=("TF-0001", "TF-0003", "TF-0004", "TF-0009", "TF-0013"),
    requires={"deepspeed": ">=0.14.0"},
    targets=(
        _target(
            "copy_grads_in_partition",
            *("520b1030c47e", "0e05a07a6440", "f9ae4eac6f94"),  # 0.14.0, 0.17.1, 0.19.0
            *("6e483cd7f843", "8d634c629f7b"),  # 0.19.5, 0.19.8
        ),
        _target(
            "reduce_ipg_grads",
            *("556e7cd4eca5", "1a8cbd04a064", "74aa3eceed6b", "af45645caf73"),  # 0.14.0, 0.14.1, 0.16.3, 0.17.2
            *("079c882a53d3", "d12b08ac8982", "743eb9f7638c", "f8b879199631"),  # 0.17.5, 0.18.5, 0.18.8, 0.19.8
        ),
        _target(
            "_release_ipg_buffers",
            *("7ac2725d5dc9", "24c87515b976", "8cf0b5b5cd42", "cac246336500"),  # 0.14.0, 0.16.5, 0.17.2, 0.19.8
        ),
        _target("check_overflow", "95885eb5de0c", may_be_replaced=True),  # 0.14.0
        _target(
            "scaled_global_norm",
            *("4137349a8230", "47b8cd8bc427", "ce60e7970492", "ad58687be10b"),  # 0.14.0, 0.16.3, 0.17.1, 0.19.8
        ),
        _target("reset_cpu_buffers", "6cda85f0819f", "fd920a77eec5"),  # 0.14.0, 0.19.8
        _target("initialize_optimizer_states", "7d07fdaa77dd"),  # 0.14.0
        _target(
            "load_state_dict",
            *("c8408baa116a", "fb311350a1b6", "ee2103039625"),  # 0.14.0, 0.14.5, 0.19.8
            may_be_replaced=True,
        ),
    ),
    relies_on=(
        _target(
            "async_accumulate_grad_in_cpu_via_gpu",
            *("01adc4774635", "ad34760dd608", "8f1759c219c1"),  # 0.14.0, 0.15.2, 0.18.3
            *("bec2396fc6ed", "75481cf1b825"),  # 0.19.0, 0.19.8
        ),
        _target("get_grad_position", "7e61f832758e", "128ee1a5e1bb"),  # 0.14.0, 0.19.7
        _target("get_param_gradient_attribute", "e33dedf92716"),  # 0.14.0
        _target("clear_grad_attribute", "695ee6b33894"),  # 0.14.0
        _target("complete_grad_norm_calculation_for_cpu_offload", "259e2fe97328", "2d91318dfcc5"),  # 0.14.0, 0.17.1
        _target("has_overflow", "406c202e7ece", "8bf201e91769", "e8f331aa0033"),  # 0.14.0, 0.17.1, 0.18.0
        _target(
            "unscale_and_clip_grads",
            *("e2219515c885", "85742446066d", "a1f3ee40972e", "a36ea04a1690"),  # 0.14.0, 0.14.3, 0.19.7, 0.19.8
        ),
        _target(
            "step",
            *("4f94c4792be6", "0ec95876ff86", "543219663f74", "40d65be63c14"),  # 0.14.0, 0.14.1, 0.15.2, 0.17.0
            *("7707a1af5aea", "7e95e0714a2b", "c3af1c7e004b", "29843ef6a42f"),  # 0.17.1, 0.17.5, 0.17.6, 0.19.2
            *("cff1f120d633", "68c61ea8e448", "7e20eada6450"),  # 0.19.5, 0.19.7, 0.19.8
        ),
    ),
    guards=(
        Guard(OPTIMIZER + "__init__", {"TF-0001": reached.middle_is_lost, "TF-0009": reached.sum_is_narrow}),
        Guard(
            "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary",
            {"TF-0003": reached.lone_is_lost},
        ),
        Guard(OPTIMIZER + "step", {"TF-0004": reached.missing_at_the_boundary}),
        Guard(OPTIMIZER + "async_accumulate_grad_in_cpu_via_gpu", {"TF-0004": reached.first_used_late}),
        Guard(OPTIMIZER + "setup_buckets", {"TF-0013": reached.second_backward}),
    ),
    build=build,
    repairs=repairs,
    group=lambda optimizer: optimizer.dp_process_group,
    in_window=window.in_window,
    notes=carriers.notes,
    limits="the repair covers DeepSpeedZeroOptimizer itself; ZenFlow's subclass, which has the errors too, is refused, "
    "and any other subclass is left alone",
    leaves_alone={
        "zero_optimization.zenflow": "ZenFlow's optimizer inherits the error and is not repaired: with trainfix, "
        "training stops with UnfixedBugError when it is built"
    },
)
