"""Counter-based noise: Philox4x32-10 (Salmon et al., 2011) and the Gumbel variables drawn from it.

A sampled byte is argmax(log p + gumbel), which is distributed as p. The noise is a pure function of (seed, absolute
position, id), so a byte is the same whichever pass, batch, draft or device produced it. With x the 32-bit word number
id % 4 of the Philox block

    counter = (id // 4, 0, position low 32 bits, position high 32 bits),  key = (seed low 32 bits, seed high 32 bits)

the noise is

    u = ((x >> 9) + 0.5) * 2^-23  in [2^-24, 1 - 2^-24],      gumbel = -log(-log(u))  in [-2.82, 16.64],

evaluated in float64 and rounded to fp32. There are only 2^23 values of u, all exact in float64. For all but one, the
exact result is more than five units of 2^-52 (1 + |gumbel|) away from the nearest fp32 rounding boundary, which exceeds
the error of any usable float64 logarithm (a test tries all values). The exception, x >> 9 = 3085996, gives 2.5e-8;
an error in its last bit is 2^-49 and vanishes in the sum with log p. So the fp32 value is correctly rounded for every
device and vector width, and does not depend on where an element lies in a tensor.

There are ten Philox rounds on 32-bit words. The key is increased by the Weyl constants W after each:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

The words are kept in int64 tensors, since torch has hardly any unsigned arithmetic. A product of two 32-bit words may
exceed int64, but multiplication wraps modulo 2^64 in two's complement, so all 64 bits of the product are there. Bits
0..31 are lo. An arithmetic shift by 32 leaves hi in the low half, with copies of the sign above it, which a mask
removes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

VOCABULARY = 260
BLOCKS = VOCABULARY // 4

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def mix_seed(seed: int, choice: int) -> int:
    """The 64-bit key of one choice of a request, as a signed int64: splitmix64 of `seed`, output number `choice`."""
    z = (seed + (choice + 1) * _GOLDEN_GAMMA) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Multipliers (both orders) [2, 1, 1], key increments of odd and even rounds [5, 2, 1, 1], block numbers [65].

    Built once for each device: a tensor made of Python numbers is copied to the device, which must not happen in a
    pass.
    """
    with torch.inference_mode(False):
        multipliers = torch.tensor(_MULTIPLIERS, dtype=torch.int64, device=device).view(2, 1, 1)
        steps = torch.arange(_ROUNDS, dtype=torch.int64, device=device).view(-1, 1, 1, 1)
        weyl = torch.tensor(_WEYL, dtype=torch.int64, device=device).view(2, 1, 1)
        blocks = torch.arange(BLOCKS, dtype=torch.int64, device=device)
        return multipliers, multipliers.flip(0), steps[0::2] * weyl.flip(0), steps[1::2] * weyl, blocks


def _philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Ten rounds over even words (c0, c2) and odd words (c1, c3) [2, N, S] with key (k0, k1) [2, N, 1].

    Overwrites `even`. Returns the words in the same arrangement; only the low 32 bits of each have a meaning.
    """
    straight, crossed, first_steps, second_steps, _ = _constants(even.device)
    first_keys = (key.flip(0) + first_steps).unbind(0)
    second_keys = (key + second_steps).unbind(0)
    # A round exchanges the two pairs. To move no data, rounds alternate between the arrangements (c0, c2) and (c2, c0)
    # of the even words. Each word of a pair is then combined (xor) with the odd word of the other half.
    products = (torch.empty_like(even), torch.empty_like(even))
    halves = tuple(product.unbind(0) for product in products)
    upper, lower = even.unbind(0)
    odd_upper, odd_lower = odd.unbind(0)
    for number in range(_ROUNDS):
        turn = number % 2
        product = products[turn]
        torch.mul(even, crossed if turn else straight, out=product)
        torch.bitwise_right_shift(product, 32, out=even)
        upper.bitwise_xor_(odd_lower)
        lower.bitwise_xor_(odd_upper)
        even.bitwise_xor_((second_keys if turn else first_keys)[number // 2])
        # The next multiplication needs bits 32 and up to be 0. Odd words may keep other bits there until the end.
        even.bitwise_and_(_WORD)
        odd_upper, odd_lower = halves[turn]
    return even, products[1]


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 blocks: counter int64 [..., 4] and key int64 [..., 2] of 32-bit words -> int64 [..., 4]."""
    shape = counter.shape
    words = counter.reshape(-1, 4).t().unsqueeze(-1)
    keys = key.expand(*shape[:-1], 2).reshape(-1, 2).t().unsqueeze(-1)
    even, odd = _philox(words[0::2].clone(), words[1::2].clone(), keys)
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1).bitwise_and_(_WORD).view(shape)


def gumbel(seeds: Tensor, positions: Tensor) -> Tensor:
    """Standard Gumbel noise of every id: mixed seeds and absolute positions, int64 [N] -> fp32 [N, 260]."""
    rows = seeds.shape[0]
    blocks = _constants(seeds.device)[4]
    even = torch.empty((2, rows, BLOCKS), dtype=torch.int64, device=seeds.device)
    even[0] = blocks
    even[1] = positions.bitwise_and(_WORD).unsqueeze(-1)
    odd = torch.zeros_like(even)
    odd[1] = (positions >> 32).bitwise_and_(_WORD).unsqueeze(-1)
    key = torch.stack((seeds, seeds >> 32)).bitwise_and_(_WORD).unsqueeze(-1)
    even, odd = _philox(even, odd, key)
    # [pair, N, block, parity] -> [N, block, pair, parity]: word number 2 * pair + parity of the block, so ids in order.
    words = torch.stack((even, odd), dim=-1).bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1)
    uniform = words.permute(1, 2, 0, 3).to(torch.float64, memory_format=torch.contiguous_format)
    uniform.add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_().float().view(rows, VOCABULARY)
