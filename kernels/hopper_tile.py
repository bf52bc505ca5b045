"""What the Hopper kernels share: rings of buffers, and one step of the online softmax."""

# Triton gives annotations of a kernel a meaning of its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# A power of two: times any scale it stays exact, so that a masked row's maximum is met exactly.
MASKED = gl.constexpr(-(2.0**100))
LN2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring, and the parity of its barriers."""
    stage += 1
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def ring(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring of buffers: (filled, emptied by every consumer)."""
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=CONSUMERS)
    return filled, emptied


@gluon.jit
def weigh(s, top, mass, scale):
    """One step of the online softmax: (weights, their scale for what came before, top, mass).

    s: raw scores [M, N]; scale includes log2(e); top [M]: the largest scaled score so far.
    """
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    alpha = gl.exp2(top - new_top)
    weights = gl.exp2(s * scale - new_top[:, None])
    return weights, alpha, new_top, mass * alpha + gl.sum(weights, 1)
