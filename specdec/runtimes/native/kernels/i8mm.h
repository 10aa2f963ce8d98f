/* Products of bytes by two tokens at once: 2 outputs x 8 inputs times 8 inputs x 2 tokens are an operation. */
#define TWO_TOKENS

/* Codes of 8 inputs of two outputs side by side, instead of 4 inputs of four. */
static inline void pair_codes(Codes *codes) {
    for (int i = 0; i < 8; i += 2) {
        Codes low = _mm256_unpacklo_epi32(codes[i], codes[i + 1]);
        codes[i + 1] = _mm256_unpackhi_epi32(codes[i], codes[i + 1]), codes[i] = low;
    }
}

/* sums[2 tokens] = start + the products of paired codes [n] and the inputs x and y [4 n]. */
static inline __attribute__((always_inline)) void sum_pairs(const Codes *codes, int n, const int8_t *x, const int8_t *y,
    int32_t x_start, int32_t y_start, Codes *sums) {
    Codes low = {{x_start, y_start, x_start, y_start}, {x_start, y_start, x_start, y_start}}, high = low; /* [output][token] */
    for (int i = 0; i < n; i += 2) {
        const int8x16_t both = vcombine_s8(vld1_s8(x + 4 * i), vld1_s8(y + 4 * i));
        low.a = vusmmlaq_s32(low.a, (uint8x16_t)codes[i].a, both), low.b = vusmmlaq_s32(low.b, (uint8x16_t)codes[i].b, both);
        high.a = vusmmlaq_s32(high.a, (uint8x16_t)codes[i + 1].a, both), high.b = vusmmlaq_s32(high.b, (uint8x16_t)codes[i + 1].b, both);
    }
    sums[0] = (Codes){vuzp1q_s32(low.a, high.a), vuzp1q_s32(low.b, high.b)};
    sums[1] = (Codes){vuzp2q_s32(low.a, high.a), vuzp2q_s32(low.b, high.b)};
}
