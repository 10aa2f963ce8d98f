/* The noise by which tokens are drawn: a function of the seed, the stream, the position and the token. */
#ifndef SPECDEC_GUMBEL_H
#define SPECDEC_GUMBEL_H

#include <stdint.h>
#include <string.h>

/* The standard Gumbel noise of a token at a position, as speculation/sampling.py has it: of Philox 4x64-10 by numpy. */
static inline float gumbel(uint64_t seed, uint64_t stream, int64_t position, int64_t token) {
    uint64_t c[4] = {(uint64_t)token / 8 + 1, 0, (uint64_t)position, 0}, k[2] = {seed, stream};
    for (int i = 0; i < 10; i++, k[0] += 0x9E3779B97F4A7C15u, k[1] += 0xBB67AE8584CAA73Bu) {
        const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0], b = (unsigned __int128)0xCA5A826395121157u * c[2];
        const uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ k[0], (uint64_t)b, (uint64_t)(a >> 64) ^ c[3] ^ k[1], (uint64_t)a};
        memcpy(c, next, sizeof c);
    }
    const float uniform = ((float)((uint32_t)(c[token % 8 / 2] >> 32 * (token % 2)) >> 1) + 0.5f) * 0x1p-31f, most = 1 - 0x1p-24f;
    return (float)-__builtin_log(-__builtin_log1p(-(double)(uniform < most ? uniform : most)));
}

#endif
