/* The noise by which tokens are drawn: a function of the seed, the stream, the position and the token. */
#ifndef SPECDEC_GUMBEL_H
#define SPECDEC_GUMBEL_H

#include <stdint.h>
#include <string.h>

enum { NOISE_BLOCK = 8 }; /* tokens whose noise is of one block of random numbers */

/* 31 random bits of each of a block's tokens, as speculation/sampling.py has them: of Philox 4x64-10 by numpy. */
static inline void noise_bits(uint64_t seed, uint64_t stream, int64_t position, int64_t block, uint32_t *bits) {
    uint64_t a = (uint64_t)block + 1, b = 0, c = (uint64_t)position, d = 0;
    for (int i = 0; i < 10; i++, seed += 0x9E3779B97F4A7C15u, stream += 0xBB67AE8584CAA73Bu) {
        const unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * a, second = (unsigned __int128)0xCA5A826395121157u * c;
        a = (uint64_t)(second >> 64) ^ b ^ seed, b = (uint64_t)second;
        c = (uint64_t)(first >> 64) ^ d ^ stream, d = (uint64_t)first;
    }
    const uint64_t words[4] = {a, b, c, d};
    for (int i = 0; i < NOISE_BLOCK; i++) bits[i] = (uint32_t)(words[i / 2] >> 32 * (i % 2)) >> 1;
}

/* The standard Gumbel noise of 31 random bits. */
static inline float gumbel_of(uint32_t bits) {
    const float uniform = ((float)bits + 0.5f) * 0x1p-31f, most = 1 - 0x1p-24f;
    return (float)-__builtin_log(-__builtin_log1p(-(double)(uniform < most ? uniform : most)));
}

/* The standard Gumbel noise of a token at a position. */
static inline float gumbel(uint64_t seed, uint64_t stream, int64_t position, int64_t token) {
    uint32_t bits[NOISE_BLOCK];
    noise_bits(seed, stream, position, token / NOISE_BLOCK, bits);
    return gumbel_of(bits[token % NOISE_BLOCK]);
}

#endif
