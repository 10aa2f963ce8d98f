/* A pass of a team of threads through decoder layers. */
#include "simd.h"
#ifdef SPECDEC_NATIVE

enum { MOST_EXPECTED = 1024 }; /* cached slots that are sent for while the projections run */

/* Tokens from block b0 on, of as many blocks as are multiplied at once. */
static int tokens_from(const Pass *p, int b0) {
    int left = p->rows - 16 * b0;
    return left < 16 * MOST_BLOCKS ? left : 16 * MOST_BLOCKS;
}

/* Low-rank activations down x of `low` for all blocks (vnni_bf16; without AMX rows_bf16), zero where a token has no
 * adapters; then all threads wait. */
static void rank_down(Pass *p, const LowRank *low, const uint32_t *x, uint32_t *ranked, int me, int n) {
    if (!low) return;
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int from, to, first = p->c->adapted > 0 ? p->c->tokens - p->c->adapted : 0;
    split(low->down.out / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            product(&low->down, NULL, t, x + (int64_t)b0 * low->down.in * 8, NULL, tokens, sums);
            for (int b = 0; b < blocks; b++) {
                __mmask16 adapted = 0;
                for (int lane = 0; lane < 16; lane++)
                    if (((b0 + b) * 16 + lane) % p->c->tokens >= first) adapted |= (__mmask16)(1 << lane);
                uint32_t *out = ranked + (int64_t)(b0 + b) * low->down.out * 8;
                for (int o = 0; o < 16; o += 2) {
                    const float *row = sums + 256 * b + 16 * o;
                    __m512i pairs = _mm512_maskz_mov_epi32(adapted, paired(_mm512_load_ps(row), _mm512_load_ps(row + 16)));
                    if (has_amx) _mm512_store_si512(out + 8 * (16 * t + o), pairs);
                    else _mm512_i32scatter_epi32(out + 8 * t + o / 2, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(low->down.out / 2)), pairs, 4);
                }
            }
        }
    }
    wait_for_team(&p->barrier, n);
}

static inline F silu_times(F gate, F up) {
    F g = rounded(gate), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(g, _mm512_set1_ps(-80.0f))));
    return _mm512_mul_ps(rounded(_mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), e))), rounded(up));
}

/* silu(gate) up for 16 outputs of a block; with few tokens, several outputs share a vector. Absent lanes get 0. */
static void gated(const float *gate, const float *up, int tokens, F *act) {
#define QUAD(from, o)                                                                                                \
    _mm512_insertf32x4(_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_load_ps((from) + 16 * (o))),  \
        _mm_load_ps((from) + 16 * (o) + 16), 1), _mm_load_ps((from) + 16 * (o) + 32), 2), _mm_load_ps((from) + 16 * (o) + 48), 3)
#define TWO(from, o) _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps((from) + 16 * (o))), _mm256_load_ps((from) + 16 * (o) + 16), 1)
    if (tokens <= 4) {
        for (int o = 0; o < 16; o += 4) {
            F v = silu_times(QUAD(gate, o), QUAD(up, o));
            act[o] = _mm512_maskz_mov_ps(15, v);
            act[o + 1] = _mm512_maskz_shuffle_f32x4(15, v, v, 1);
            act[o + 2] = _mm512_maskz_shuffle_f32x4(15, v, v, 2);
            act[o + 3] = _mm512_maskz_shuffle_f32x4(15, v, v, 3);
        }
    } else if (tokens <= 8) {
        for (int o = 0; o < 16; o += 2) {
            F v = silu_times(TWO(gate, o), TWO(up, o));
            act[o] = _mm512_maskz_mov_ps(255, v);
            act[o + 1] = _mm512_maskz_shuffle_f32x4(255, v, v, 14);
        }
    } else
        for (int o = 0; o < 16; o++) act[o] = silu_times(_mm512_load_ps(gate + 16 * o), _mm512_load_ps(up + 16 * o));
#undef QUAD
#undef TWO
}

/* x += map(vnni_bf16 in), rounded as transformers does: the product once, the sum once. */
static void add_product(Pass *p, const Map *map, const LowRank *low, const uint32_t *in, const uint32_t *ranked, int me, int n) {
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64)));
    int from, to;
    split(map->out / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            const uint32_t *low_x = low ? ranked + (int64_t)b0 * low->down.out * 8 : NULL;
            for (int b = 0; b < blocks; b++)
                for (int o = 0; o < 16; o++) __builtin_prefetch(p->x + ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16, 1);
            product(map, low, t, from_block(map, in, b0), low_x, tokens, sums);
            for (int b = 0; b < blocks; b++)
                for (int o = 0; o < 16; o++) {
                    float *x = p->x + ((int64_t)(b0 + b) * map->out + 16 * t + o) * 16;
                    _mm512_store_ps(x, rounded(_mm512_add_ps(_mm512_load_ps(x), rounded(_mm512_load_ps(sums + 256 * b + 16 * o)))));
                }
        }
    }
}

/* Part `at` of `parts` of the cached keys and values that the thread will attend to: on their way while it multiplies. */
static void prefetch_cache(const Pass *p, int index, int at, int parts, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    int items = c->batch * m->kv_heads, together, from, to;
    split(p->slots < MOST_EXPECTED ? p->slots * m->head_dim / 32 : 0, at, parts, &from, &to);
    for (int turn = 0; turn < turns_of(items, n); turn++) {
        int item = item_of(turn, items, me, n, &together);
        int64_t first = (int64_t)item * c->capacity[index] * m->head_dim;
        for (int line = from; line < to; line++) {
            _mm_prefetch((const char *)(c->keys[index] + first + 32 * line), _MM_HINT_T1);
            _mm_prefetch((const char *)(c->values[index] + first + 32 * line), _MM_HINT_T1);
        }
    }
}

static void run_layer(Pass *p, int index, uint32_t *normed, float *scores, uint8_t *int8_input, int me, int n) {
    const Model *m = p->m;
    const Call *c = p->c;
    const Layer *layer = m->layers + index;
    const LowRank *low = c->low ? c->low[index] : NULL;
    int d = m->head_dim, total = m->heads + 2 * m->kv_heads, from, to;
    float sums[MOST_BLOCKS * 256] __attribute__((aligned(64))), gate[MOST_BLOCKS * 256] __attribute__((aligned(64)));
#define LOW(i) (low && low[i].ks ? low + (i) : NULL)

    for (int b = 0; b < p->blocks; b++) /* every thread for itself: cheaper than waiting for each other */
        norm(p->x + (int64_t)b * m->hidden * 16, layer->norm_in, m->hidden, m->eps, normed + (int64_t)b * m->hidden * 8);
    const uint32_t *input = input_of(&layer->qkv, normed, p->rows, int8_input);
    rank_down(p, LOW(0), input, p->ranked[0], me, n);
    split(total * d / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            if (!b0) prefetch_cache(p, index, t - from, to - from, me, n);
            const uint32_t *low_x = low && low[0].ks ? p->ranked[0] + (int64_t)b0 * low[0].down.out * 8 : NULL;
            product(&layer->qkv, LOW(0), t, from_block(&layer->qkv, input, b0), low_x, tokens, sums);
            for (int b = 0; b < blocks; b++)
                memcpy(p->qkv + ((int64_t)(b0 + b) * total * d + 16 * t) * 16, sums + 256 * b, 1024);
        }
    }
    wait_for_team(&p->barrier, n);

    split(p->blocks * total, me, n, &from, &to);
    for (int item = from; item < to; item++) { /* one head of a block: rotate, then put rows where they belong */
        int b = item / total, head = item % total, kv = head - m->heads;
        float *fm = p->qkv + ((int64_t)b * total + head) * d * 16;
        const float *weight = kv < 0 ? layer->norm_q : layer->norm_k;
        int64_t at = (int64_t)b * (m->rotated / 2) * 16;
        if (kv < m->kv_heads) rotate(fm, m, weight, p->cos + at, p->sin + at);
        for (int lane = 0; lane < 16 && b * 16 + lane < p->rows; lane++) {
            int row = b * 16 + lane, line = row / c->tokens, slot = c->start + row % c->tokens;
            bf16 *to_ = kv < 0 ? p->queries + ((int64_t)row * m->heads + head) * d
                               : (kv < m->kv_heads ? c->keys : c->values)[index] +
                                     (((int64_t)line * m->kv_heads + kv % m->kv_heads) * c->capacity[index] + slot) * d;
            for (int i = 0; i < d; i++) to_[i] = narrow(fm[16 * i + lane]);
        }
    }
    wait_for_team(&p->barrier, n);

    uint32_t q[16 * 128] __attribute__((aligned(64)));
    float out[16 * 256] __attribute__((aligned(64)));
    int items = c->batch * m->kv_heads * p->column_blocks, together;
    for (int turn = 0; turn < turns_of(items, n); turn++) {
        int item = item_of(turn, items, me, n, &together);
        int block = item % p->column_blocks, kv = item / p->column_blocks % m->kv_heads, line = item / p->column_blocks / m->kv_heads;
        int bit = 0, end = c->tokens * p->group - 16 * block < 16 ? c->tokens * p->group - 16 * block : 16;
        if (together) split(end, me, n, &bit, &end); /* by columns */
        int first = 16 * block + bit, columns = end - bit;
        if (!columns) continue;
        memset(q, 0, 32 * d);
        for (int col = 0; col < columns; col++) {
            int row = line * c->tokens + (first + col) / p->group, head = kv * p->group + (first + col) % p->group;
            const uint32_t *pairs = (const uint32_t *)(p->queries + ((int64_t)row * m->heads + head) * d);
            for (int i = 0; i < d / 2; i++) q[16 * i + col] = pairs[i];
        }
        int64_t cached = ((int64_t)line * m->kv_heads + kv) * c->capacity[index] * d;
        const uint16_t *visible = p->visible[c->window[index]];
        if (visible) visible += ((int64_t)line * p->column_blocks + block) * p->slots;
        attend(c->keys[index] + cached, c->values[index] + cached, p->slots, d, q, columns, visible, bit, m->scale, p->column_blocks == 1, scores, out);
        for (int col = 0; col < columns; col++) {
            int row = line * c->tokens + (first + col) / p->group, head = kv * p->group + (first + col) % p->group;
            uint32_t *lane = p->attended + ((int64_t)(row / 16) * m->heads * d + head * d) * 8 + row % 16;
            for (int i = 0; i < d; i += 16) {
                uint32_t pairs[8] __attribute__((aligned(32)));
                _mm256_store_si256((__m256i *)pairs, narrow16(_mm512_load_ps(out + col * d + i)));
                for (int j = 0; j < 8; j++) lane[8 * i + 16 * j] = pairs[j];
            }
        }
    }
    wait_for_team(&p->barrier, n);

    input = input_of(&layer->out, p->attended, p->rows, int8_input);
    rank_down(p, LOW(1), input, p->ranked[1], me, n);
    add_product(p, &layer->out, LOW(1), input, p->ranked[1], me, n);
    wait_for_team(&p->barrier, n);

    for (int b = 0; b < p->blocks; b++)
        norm(p->x + (int64_t)b * m->hidden * 16, layer->norm_mlp, m->hidden, m->eps, normed + (int64_t)b * m->hidden * 8);
    input = input_of(&layer->gate_up, normed, p->rows, int8_input);
    rank_down(p, LOW(2), input, p->ranked[0], me, n);
    split(m->inner / 16, me, n, &from, &to);
    for (int b0 = 0; b0 < p->blocks; b0 += MOST_BLOCKS) {
        int tokens = tokens_from(p, b0), blocks = (tokens + 15) / 16;
        for (int t = from; t < to; t++) {
            const uint32_t *x = from_block(&layer->gate_up, input, b0);
            const uint32_t *low_x = low && low[2].ks ? p->ranked[0] + (int64_t)b0 * low[2].down.out * 8 : NULL;
            product(&layer->gate_up, LOW(2), t, x, low_x, tokens, gate);
            product(&layer->gate_up, LOW(2), m->inner / 16 + t, x, low_x, tokens, sums);
            for (int b = 0; b < blocks; b++) {
                uint32_t *inner = p->inner + ((int64_t)(b0 + b) * m->inner + 16 * t) * 8;
                F act[16];
                gated(gate + 256 * b, sums + 256 * b, p->rows - 16 * (b0 + b), act);
                for (int o = 0; o < 16; o += 2) _mm512_store_si512(inner + 8 * o, paired(act[o], act[o + 1]));
            }
        }
    }
    wait_for_team(&p->barrier, n);

    input = input_of(&layer->down, p->inner, p->rows, int8_input);
    rank_down(p, LOW(3), input, p->ranked[1], me, n);
    add_product(p, &layer->down, LOW(3), input, p->ranked[1], me, n);
    wait_for_team(&p->barrier, n);
#undef LOW
}

/* For each key and 16 columns (a token and a query head of the group each), which columns see it. mask NULL: the last
 * `span` keys up to a token's own, or all of them. */
static uint16_t *columns_that_see(const Pass *p, const uint8_t *mask, int span) {
    const Call *c = p->c;
    uint16_t *out = allocate(2 * (size_t)c->batch * p->column_blocks * p->slots + 32);
    if (!out) return NULL;
    memset(out, 0, 2 * (size_t)c->batch * p->column_blocks * p->slots);
    for (int line = 0; line < c->batch; line++)
        for (int col = 0; col < c->tokens * p->group; col++) {
            int token = col / p->group, end = mask ? p->slots : c->start + token + 1, first = span && span < end ? end - span : 0;
            const uint8_t *see = mask ? mask + ((int64_t)line * c->tokens + token) * p->slots : NULL;
            uint16_t *to = out + ((int64_t)line * p->column_blocks + col / 16) * p->slots, bit = (uint16_t)(1 << col % 16);
            if (mask)
                for (int s = 0; s < end; s++) to[s] |= see[s] ? bit : 0;
            else
                for (int s = first; s < end; s++) to[s] |= bit;
        }
    return out;
}

/* Layers [lo, hi) of the call, in a team. */
void run_layers(Pass *p, int me, int n) {
    const Call *c = p->c;
    uint8_t *mine = p->scratch + p->own * me;
    for (int index = c->lo; index < c->hi; index++) {
        if (c->taps[index]) {
            int from, to;
            split(p->rows, me, n, &from, &to);
            from_blocks(p->x, from, to, p->m->hidden, c->taps[index]);
        }
        run_layer(p, index, (uint32_t *)mine, (float *)(mine + p->scored), mine + p->int8_input, me, n);
    }
}

/* Room for passes of `m` over so many tokens as `c` has, over at most `slots` cached ones, whose maps read at most
 * `widest` inputs besides the layers' own. Returns 0, or -1 without memory. `end` in any case. */
int begin_pass(Pass *p, const Model *m, const Call *c, int slots, int widest) {
    memset(p, 0, sizeof *p);
    p->m = m, p->rows = c->batch * c->tokens, p->blocks = (p->rows + 15) / 16, p->group = m->heads / m->kv_heads;
    p->column_blocks = (c->tokens * p->group + 15) / 16;
    int total = (m->heads + 2 * m->kv_heads) * m->head_dim, half = m->rotated / 2;
    size_t blocks = (size_t)p->blocks;
    for (int l = c->lo; c->low && l < c->hi; l++)
        for (int i = 0; c->low[l] && i < 4; i++)
            if (c->low[l][i].ks && c->low[l][i].down.out > p->ranks) p->ranks = c->low[l][i].down.out;
    p->x = allocate(64 * blocks * m->hidden);
    p->qkv = allocate(64 * blocks * total);
    p->cos = allocate(64 * blocks * half);
    p->sin = allocate(64 * blocks * half);
    p->attended = allocate(32 * blocks * m->heads * m->head_dim);
    p->inner = allocate(32 * blocks * m->inner);
    p->ranked[0] = allocate(32 * blocks * (p->ranks + 2));
    p->ranked[1] = allocate(32 * blocks * (p->ranks + 2));
    p->queries = allocate(2 * (size_t)p->rows * m->heads * m->head_dim);
    if (widest < m->hidden) widest = m->hidden;
    p->scored = (32 * blocks * widest + 63) / 64 * 64;
    if (widest < m->inner) widest = m->inner;
    if (widest < m->heads * m->head_dim) widest = m->heads * m->head_dim;
    p->int8_input = p->scored + 64 * ((size_t)slots + 16);
    p->own = p->int8_input + scratch_bytes(widest, p->blocks);
    p->scratch = allocate(p->own * c->threads);
    if (!(p->x && p->qkv && p->cos && p->sin && p->attended && p->inner && p->ranked[0] && p->ranked[1] && p->queries && p->scratch))
        return -1;
    memset(p->attended, 0, 32 * blocks * m->heads * m->head_dim);
    memset(p->cos, 0, 64 * blocks * half);
    memset(p->sin, 0, 64 * blocks * half);
    for (int r = 0; r < p->rows; r++)
        for (int i = 0; i < half; i++) {
            int64_t at = ((int64_t)(r / 16) * half + i) * 16 + r % 16, from = c->positions[r] * 2 * half + i;
            p->cos[at] = c->rotary[from], p->sin[at] = c->rotary[from + half];
        }
    return 0;
}

void end_pass(Pass *p) {
    free(p->x), free(p->qkv), free(p->cos), free(p->sin), free(p->attended), free(p->inner), free(p->ranked[0]);
    free(p->ranked[1]), free(p->queries), free(p->scratch);
}

/* Aim a pass at a call's cached tokens. Returns 0, or -1 without memory. `leave` in any case. */
int bind_cache(Pass *p, const Call *c) {
    p->c = c, p->slots = c->start + c->tokens;
    memset(&p->barrier, 0, sizeof p->barrier);
    p->visible = calloc((size_t)c->windows, sizeof *p->visible);
    for (int w = 0; p->visible && w < c->windows; w++)
        if (c->causal ? c->tokens > 1 || (c->spans[w] && c->spans[w] < p->slots) : c->masks[w] != NULL)
            if (!(p->visible[w] = columns_that_see(p, c->causal ? NULL : c->masks[w], c->spans[w]))) return -1;
    return p->visible ? 0 : -1;
}

void unbind_cache(Pass *p) {
    for (int w = 0; p->visible && w < p->c->windows; w++) free(p->visible[w]);
    free(p->visible);
}

/* Run layers [lo, hi) of a call. Returns 0, or -1 if there is no memory (nothing has happened then). */
EXPORT int specdec_layers(const Model *m, const Call *c) {
    Pass p;
    int failed = begin_pass(&p, m, c, c->start + c->tokens, 0) | bind_cache(&p, c);
    if (!failed) {
        to_blocks(c->x, p.rows, m->hidden, p.x);
#pragma omp parallel num_threads(c->threads)
        {
            int me = omp_get_thread_num(), n = omp_get_num_threads(), from, to;
            enter_tiles();
            run_layers(&p, me, n);
            split(p.rows, me, n, &from, &to);
            from_blocks(p.x, from, to, m->hidden, c->x);
            leave_tiles();
        }
        if (c->taps[c->hi]) memcpy(c->taps[c->hi], c->x, 2 * (size_t)p.rows * m->hidden);
    }
    unbind_cache(&p), end_pass(&p);
    return failed;
}
#endif
