"""JAX's two kernels for TPUs as backends: what they can do, and the arrays that they take.

Splash attention visits the tiles that a mask leaves. Of a mask that is known when the program is traced,
its segments aside, it holds the tiles that it needs; of any other, every pair, in 32 bits, twice while
gradients are taken. Flash attention takes a bias, which is every pair as well. How much of that is still
sensible is a limit of the backend, beyond which it refuses.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array

from attnlab.attention.backends.registry import (
    AttentionArgs,
    AttentionResult,
    apply_sinks,
    sharded_length_reason,
    softmax_only_reason,
)
from attnlab.attention.block_mask import depends_on, equal_part, is_traced
from attnlab.attention.masks.base import AndMask, Mask
from attnlab.attention.masks.basic import Causal, Segments
from attnlab.attention.masks.dense import GIB, added, allowed, pairs_added, pairs_allowed, told
from attnlab.attention.scores import Softcap

LANES = 128  # of a TPU's vector registers: tiles are made of so many queries and keys


class Splash:
    """Any mask, a softcap and sinks; in memory linear in the length where the mask is known when compiled.

    Attributes:
      tile: the most queries and keys of a tile; None is what fits the vector memory that a kernel gets.
      interpret: run the kernel as a plain JAX program, on any platform.
      most: the most bytes of a mask that is held whole.
    """

    name = "splash"

    def __init__(self, tile: int | None = None, interpret: bool = False, most: int = GIB):
        self.tile, self.interpret, self.most = tile, interpret, most

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if reason := _refuse(args, self.interpret):
            return reason
        if args.score is not None and not _is_softcap(args.score):
            return "it changes scores by softcap(number) alone"
        _, mask = _split(args.mask)
        if mask is None or _is_known(mask, args):
            return None
        size = 4 * pairs_allowed(mask, args)
        if size > self.most:
            return (
                f"the mask, its segments aside, is known only when run or differs between rows of the batch, "
                f"and would take {told(size)} as a whole"
            )
        return None

    def run(self, args, first):
        """See `Backend.run`."""
        from attnlab.attention.backends import splash  # only now, as it brings Pallas along

        lengths = args.query.shape[1], args.key.shape[1]
        wide = max(args.query.shape[-1], args.value.shape[-1]) > 128 or args.query.dtype == jnp.float32
        tile = _tiles(args, self.tile or (512 if wide else 1024))
        whole = _whole(lengths, tile)
        segments, mask = _split(args.mask)
        options = {"softcap": args.score.cap if args.score else None, "interpret": self.interpret}
        if mask is None or _is_known(mask, args):
            kernel, pairs = splash.known(mask, args.query.shape[2], lengths, tile, **options), None
        else:
            kernel = splash.unknown(tile, **options)
            pairs = _padded(allowed(mask, args, first), whole, False)
            pairs = pairs if len(pairs) > 1 else pairs[0]  # one for all rows
        if kernel is None:
            rows = args.query.shape[:3]
            out, lse = jnp.zeros((*rows, args.value.shape[-1]), args.value.dtype), jnp.full(rows, -jnp.inf)
        else:
            query, key, value = _laid_out(args, whole)
            ids = segments and splash.ids(segments.queries, segments.keys, len(query), whole)
            out, lse = splash.attention(kernel, query, key, value, ids, pairs)
            out, lse = (jnp.swapaxes(x, 1, 2)[:, : lengths[0]] for x in (out, lse))
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


class Flash:
    """Scores that add to the product what does not depend on it, with gradients; any mask, sinks.

    Attributes:
      tile: the most queries and keys of a tile; None is what fits the vector memory that a kernel gets.
      interpret: run the kernel as a plain JAX program, on any platform.
      most: the most bytes of the bias that score and mask are made to.
    """

    name = "flash"

    def __init__(self, tile: int | None = None, interpret: bool = False, most: int = GIB):
        self.tile, self.interpret, self.most = tile, interpret, most

    def unsupported_reason(self, args):
        """See `Backend.unsupported_reason`."""
        if reason := _refuse(args, self.interpret):
            return reason
        if args.score is not None and not args.score.adds:
            return "of scores it takes those that only add, as bias and alibi do"
        size = 4 * pairs_added(args)
        if size > self.most:
            return f"its bias would take {told(size)} as a whole"
        return None

    def run(self, args, first):
        """See `Backend.run`."""
        from attnlab.attention.backends import flash  # only now, as it brings Pallas along

        (_, t, h, _), s = args.query.shape, args.key.shape[1]
        tile = _tiles(args, self.tile or 512)
        whole = _whole((t, s), tile)
        query, key, value = _laid_out(args, whole)
        key, value = (jnp.repeat(x, h // x.shape[1], 1) for x in (key, value))
        width = max(query.shape[-1], value.shape[-1])
        width += -width % LANES if width > LANES else 0
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (query, key, value)
        )
        bias = added(args, first)
        if args.mask is not None:
            bias = jnp.where(allowed(args.mask, args, first), bias, -jnp.inf)
        bias = _padded(bias, whole, -jnp.inf)
        how = flash.How(tile, _is_causal(args.mask), self.interpret)
        out, lse = flash.attention(how, query, key, value, bias)
        out, lse = (jnp.swapaxes(x, 1, 2)[:, :t] for x in (out[..., : args.value.shape[-1]], lse))
        return AttentionResult(*(out, lse) if args.sinks is None else apply_sinks(out, lse, args.sinks))


def _refuse(args: AttentionArgs, interpret: bool) -> str | None:
    """Why neither kernel can do what is asked."""
    if args.platform != "tpu" and not interpret:
        return f"it is for TPUs, and this is for a {args.platform.upper()}"
    if reason := sharded_length_reason(args) or softmax_only_reason(args):
        return reason
    dtypes = {x.dtype.name for x in (args.query, args.key, args.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"it takes bfloat16 or float32, the same for all three, not {', '.join(sorted(dtypes))}"
    if min(args.query.shape[1], args.key.shape[1]) < LANES and not interpret:
        return f"its smallest tile is {LANES} queries by {LANES} keys"
    return None


def _is_softcap(score) -> bool:
    return isinstance(score, Softcap) and isinstance(score.cap, int | float)


def _split(mask: Mask | None) -> tuple[Segments | None, Mask | None]:
    """The segments that are one side of an `And` at the top of a mask, and the rest of it."""
    if isinstance(mask, Segments):
        return mask, None
    if isinstance(mask, AndMask):
        for one, other in ((mask.left, mask.right), (mask.right, mask.left)):
            segments, rest = _split(one)
            if segments is not None:
                return segments, other if rest is None else rest & other
    return None, mask


def _is_known(mask: Mask, args: AttentionArgs) -> bool:
    """Whether the mask can be cut into tiles while the program is traced: one for all rows of the batch."""
    if is_traced(mask):
        return False
    rows, heads = depends_on(mask)
    return not rows and not (heads and args.is_sharded)  # which heads a device has is known only when run


def _is_causal(mask: Mask | None) -> bool:
    """Whether a mask is known to allow no key after the query of its own number."""
    if isinstance(mask, AndMask):
        return _is_causal(mask.left) or _is_causal(mask.right)
    return isinstance(mask, Causal) and isinstance(mask.offset, int) and mask.offset <= 0


def _tiles(args: AttentionArgs, most: int) -> tuple[int, int]:
    """Queries and keys of equal tiles that are at most so long, and whole registers."""
    q, k = (-(-equal_part(x.shape[1], most) // LANES) * LANES for x in (args.query, args.key))
    return q, k


def _whole(lengths: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """The lengths, up to whole tiles."""
    t, s = (-(-length // size) * size for length, size in zip(lengths, tile, strict=True))
    return t, s


def _laid_out(args: AttentionArgs, whole: tuple[int, int]) -> Iterator[Array]:
    """Scaled queries, keys and values, each (B, H, T, D)."""
    query = (args.query * args.scale).astype(args.query.dtype)
    for x, length in zip((query, args.key, args.value), (whole[0], whole[1], whole[1]), strict=True):
        x = jnp.swapaxes(x, 1, 2)
        yield jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _padded(x: Array, whole: tuple[int, int], filler) -> Array:
    more = [(0, length - n) for n, length in zip(x.shape[-2:], whole, strict=True)]
    return jnp.pad(x, [(0, 0), (0, 0), *more], constant_values=filler)
