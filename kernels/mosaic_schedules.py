"""In which order a warpgroup of Hopper multiplies and weighs the blocks of its list.

The tensor cores stand still while exponentials are taken. The two schedules of FlashAttention-3
(arXiv:2407.08608, sections 3.1 and 3.2) fill that time: with the products of the other warpgroup,
or with those of the warpgroup's own next block.

Both take the queries of a warpgroup, [rows, head_dim], and the rings of keys and of values. `test`
masks the logits of the list's n-th block, which the first `tested` of `count` blocks need. They
return the weighted sum of values, and of each row the largest logit, times `factor`, and the sum of
the weights.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from svg_jax.kernels import mosaic_common as mgpu


def pass_turn(turn) -> None:
    """Let the other warpgroup go on, and wait until it does the same."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def alternating(my_q, keys, values, turn, staging, *, test, tested, count, factor, interpret):
    """Visit a list while the other warpgroup is half a step away: one multiplies, one weighs."""

    def visit(n, carry, is_tested: bool):
        acc, row_max, row_sum = carry
        slot = keys.slot(n)
        plgpu.barrier_wait(keys.ready.at[slot])
        logits = mgpu.logits(my_q, keys.tiles.at[slot], staging, partial(pass_turn, turn))
        plgpu.barrier_arrive(keys.free.at[slot])
        if is_tested:
            logits = test(logits, n)
        weights, rescale, row_max = mgpu.online_softmax(logits, row_max, factor)
        acc *= mgpu.by_row(rescale, acc.shape)
        row_sum = row_sum * rescale + weights.sum(axis=1)
        narrow = weights.astype(my_q.dtype)
        # All of this is to be done before the other warpgroup gets its turn.
        acc, row_sum, row_max, narrow = lax.optimization_barrier((acc, row_sum, row_max, narrow))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(values.ready.at[slot])
        plgpu.barrier_wait(turn)
        acc = mgpu.product(narrow, values.tiles.at[slot], acc, staging)
        plgpu.barrier_arrive(values.free.at[slot])
        return acc, row_max, row_sum

    carry = mgpu.empty_accumulator(my_q.shape[-1], interpret)
    carry = lax.fori_loop(0, tested, partial(visit, is_tested=True), carry)
    return lax.fori_loop(tested, count, partial(visit, is_tested=False), carry)


def overlapped(my_q, keys, values, turn, staging, *, test, tested, count, factor, interpret):
    """Visit a list with the products of one block running under the weighing of the next."""
    del turn
    acc, row_max, row_sum = mgpu.empty_accumulator(my_q.shape[-1], interpret)

    slot = keys.slot(0)
    plgpu.barrier_wait(keys.ready.at[slot])
    logits = mgpu.logits(my_q, keys.tiles.at[slot], staging)
    plgpu.barrier_arrive(keys.free.at[slot])
    # Testing a block that needs no test changes nothing.
    weights, _, row_max = mgpu.online_softmax(test(logits, 0), row_max, factor)
    narrow, row_sum = weights.astype(my_q.dtype), weights.sum(axis=1)

    def visit(n, carry, is_tested: bool):
        acc, narrow, row_max, row_sum = carry
        slot, last = keys.slot(n), keys.slot(n - 1)
        plgpu.barrier_wait(keys.ready.at[slot])
        plgpu.barrier_wait(values.ready.at[last])

        def online_softmax(logits):
            plgpu.barrier_arrive(keys.free.at[slot])
            return mgpu.online_softmax(test(logits, n) if is_tested else logits, row_max, factor)

        def multiply_both(acc_ref, logits_ref):
            acc_ref[...] = acc
            mgpu.add_logits(logits_ref, my_q, keys.tiles.at[slot], staging)
            plgpu.wgmma(acc_ref, narrow, values.tiles.at[last])
            weighed = online_softmax(plgpu.wgmma_accumulator_load(logits_ref, wait_n=1))
            return plgpu.wgmma_accumulator_load(acc_ref, wait_n=0), *weighed

        if staging is None:
            shape = (mgpu.ROWS, keys.tiles.shape[1])
            acc, weights, rescale, row_max = pl.run_scoped(
                multiply_both, plgpu.ACC(acc.shape, jnp.float32), plgpu.ACC(shape, jnp.float32)
            )
        else:
            acc = mgpu.product(narrow, values.tiles.at[last], acc, staging)
            weights, rescale, row_max = online_softmax(
                mgpu.logits(my_q, keys.tiles.at[slot], staging)
            )
        plgpu.barrier_arrive(values.free.at[last])
        acc *= mgpu.by_row(rescale, acc.shape)
        row_sum = row_sum * rescale + weights.sum(axis=1)
        return acc, weights.astype(my_q.dtype), row_max, row_sum

    carry = (acc, narrow, row_max, row_sum)
    carry = lax.fori_loop(1, tested, partial(visit, is_tested=True), carry)
    carry = lax.fori_loop(jnp.maximum(tested, 1), count, partial(visit, is_tested=False), carry)
    acc, narrow, row_max, row_sum = carry
    slot = keys.slot(count - 1)
    plgpu.barrier_wait(values.ready.at[slot])
    acc = mgpu.product(narrow, values.tiles.at[slot], acc, staging)
    plgpu.barrier_arrive(values.free.at[slot])
    return acc, row_max, row_sum
