/* Tiles unpacked into registers of AVX-512, as bf16 rows of 32 inputs. */

INLINE F halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE F whole(__m512i v) { return _mm512_cvtepi32_ps(v); }

/* What a group's head holds, float [tile][2][16 outputs]: scale and low (K6: a scale for each half of the inputs). From
 * memory they are spread for nothing. */
INLINE void read_head(int kind, const uint8_t *head, float *scales) {
    F d = halves(head), m = kind == Q8 || kind == K6 ? d : halves(head + 32);
    if (kind == K4 || kind == K5)
        for (int k = 0; k < 8; k++) {
            __m128i sc = _mm_loadu_si128((const __m128i *)(head + 64) + k), mn = _mm_loadu_si128((const __m128i *)(head + 192) + k);
            _mm512_store_ps(scales + 32 * k, _mm512_mul_ps(d, whole(_mm512_cvtepu8_epi32(sc))));
            _mm512_store_ps(scales + 32 * k + 16, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(m, whole(_mm512_cvtepu8_epi32(mn)))));
        }
    else if (kind == K6)
        for (int k = 0; k < 16; k++) {
            F sc = whole(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(head + 64) + k)));
            _mm512_store_ps(scales + 16 * k, _mm512_mul_ps(d, sc));
        }
    else _mm512_store_ps(scales, d), _mm512_store_ps(scales + 16, m);
}

/* The bf16 values of all codes of 4 bits, for four rows: two rows share a table of 32 entries. */
INLINE void make_tables(const float *scale, const float *low, __m512i *table) {
    const F steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    F a = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[0]), _mm512_set1_ps(low[0]));
    F b = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[1]), _mm512_set1_ps(low[1]));
    F c = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[2]), _mm512_set1_ps(low[2]));
    F d = _mm512_fmadd_ps(steps, _mm512_set1_ps(scale[3]), _mm512_set1_ps(low[3]));
    table[0] = (__m512i)_mm512_cvtne2ps_pbh(b, a), table[1] = (__m512i)_mm512_cvtne2ps_pbh(d, c);
}

INLINE void look_up(const uint8_t *nibbles, const __m512i *table, __m512i *row) {
    const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
    __m512i words = _mm512_loadu_si512(nibbles);
    __m512i other = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, second, 0xea); /* x & y | z */
    row[0] = _mm512_permutexvar_epi16(_mm512_and_si512(words, nibble), table[0]);
    row[1] = _mm512_permutexvar_epi16(other, table[0]);
    row[2] = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(words, 8), nibble), table[1]);
    row[3] = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(words, 12), second), table[1]);
}

/* Four rows of 5-bit codes: each has a table of its own. */
INLINE void look_up5(const uint8_t *nibbles, const uint32_t *bits, const float *scale, const float *low, __m512i *row) {
    const F steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), more = _mm512_add_ps(steps, _mm512_set1_ps(16));
    const __m512i nibble = _mm512_set1_epi16(15), fifth = _mm512_set1_epi16(16);
    __m512i words = _mm512_loadu_si512(nibbles);
    for (int o = 0; o < 4; o++) {
        F d = _mm512_set1_ps(scale[o]), m = _mm512_set1_ps(low[o]);
        __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(more, d, m), _mm512_fmadd_ps(steps, d, m));
        __m512i code = _mm512_and_si512(o ? _mm512_srli_epi16(words, 4 * o) : words, nibble);
        row[o] = _mm512_permutexvar_epi16(_mm512_mask_add_epi16(code, bits[o], code, fifth), table);
    }
}

/* A row of 8-bit codes, with a scale for each half of it. */
INLINE __m512i scale8(const uint8_t *codes, float first, float second) {
    F a = whole(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    F b = whole(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16))));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, _mm512_set1_ps(second)), _mm512_mul_ps(a, _mm512_set1_ps(first)));
}

/* One half of I4's tile, int8 [8][16 outputs][4 inputs]: bytes are multiplied two in a word, whose products do not meet. */
INLINE void eight_rows4(const uint8_t *tile, int half_, __m512i *row) {
    const __m512i bytes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x01010101));
    const __m512i words = _mm512_or_si512(bytes, _mm512_set1_epi16(-32768)), low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16);
    __m512i step = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)tile + 2 * half_)), words);
    __m512i least = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)tile + 2 * half_ + 1)), bytes);
    __m512i above = _mm512_slli_epi16(step, 12); /* codes in the upper half of a byte are 16 times as large */
    for (int i = 0; i < 4; i++) {
        __m512i both = _mm512_load_si512(tile + GROUPS[I4].head + 256 * half_ + 64 * i);
        row[2 * i] = _mm512_add_epi8(_mm512_mullo_epi16(_mm512_and_si512(both, low), step), least);
        row[2 * i + 1] = _mm512_add_epi8(_mm512_mulhi_epu16(_mm512_and_si512(both, high), above), least);
    }
}

/* whole [16 tokens][16 outputs], `more` too large, times the scales of both, to sums[16 outputs][16 lanes]. lanes: their
 * scales. */
INLINE void scale4(const int32_t *whole_, const float *lanes, const float *more, const float *scale, float *sums) {
    __m512i a[16];
    for (int r = 0; r < 16; r++) {
        F v = whole(_mm512_load_si512(whole_ + 16 * r));
        if (more) v = _mm512_sub_ps(v, _mm512_set1_ps(more[r]));
        a[r] = _mm512_castps_si512(_mm512_mul_ps(v, _mm512_set1_ps(lanes[r])));
    }
    transpose(a);
    for (int o = 0; o < 16; o++) _mm512_store_ps(sums + 16 * o, _mm512_mul_ps(_mm512_castsi512_ps(a[o]), _mm512_set1_ps(scale[o])));
}

/* Rows 4 quad .. of a tile, from its codes, with its `scales`. */
INLINE void four_rows(int kind, const uint8_t *codes, int quad, const float *scales, __m512i *row) {
    const float *first = scales + 4 * quad, *second = first + 16;
    if (kind == Q4 || kind == K4) {
        __m512i table[2];
        make_tables(first, second, table);
        look_up(codes + 64 * quad, table, row);
    } else if (kind == Q5 || kind == K5) look_up5(codes + 64 * quad, (const uint32_t *)(codes + 256) + 4 * quad, first, second, row);
    else
        for (int o = 0; o < 4; o++)
            row[o] = kind == Q8 || kind == K6 ? scale8(codes + 32 * (4 * quad + o), first[o], kind == K6 ? second[o] : first[o])
                                              : _mm512_load_si512(codes + 256 * quad + 64 * o);
}
