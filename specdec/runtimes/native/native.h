/* The native runtime's kernels: whole decoder layers of a Llama-like model in one call, for x86 CPUs with AVX-512 BF16.
 *
 * They exist because a token's result must not depend on what else is in its pass. Speculative decoding scores several
 * tokens at once and compares them with what one at a time would have given; usual libraries choose another order of sums
 * for another number of rows. Here every token is computed by the same operations in the same order whatever is scored
 * beside it: attention adds the visible keys one by one, and an invisible one adds an exact zero. So a token's logits do
 * not depend, to the last bit, on how many tokens a pass has, nor on the cache slots of a tree's branches.
 *
 * Weights lie in tiles of 16 outputs x 32 inputs, in bf16, or in 8 or 4 bits that unpack to bf16. With AMX, a tile is
 * unpacked in the first-level cache and multiplied with 16 tokens at once: a pass costs what reading the weights costs,
 * however many of the 16 tokens are there. Without, a tile's rows are unpacked into registers and multiplied with one
 * token after another. Drafts need not be exact: their maps may be I8, whose products need no unpacking, or I4, half as
 * large.
 *
 * Layouts of activations, for blocks of 16 tokens ("lanes"):
 *   feature_major  float [features][16]
 *   vnni_bf16      bf16 pairs [features / 2][16]: what AMX multiplies with bf16 tiles
 *   vnni_int8      int8 quads [features / 4][16], then each lane's scale: the same for I8 maps
 *   rows_bf16      bf16 [16 tokens][features]: what the products without AMX read
 *   rows_int8      int8 [16][features], each token's scale, and 128 times its sum: the same for I8 and I4 maps
 *
 * Files: simd.h numbers and tiles in registers; amx.c and avx512.c products of tiles; linear.c linear maps; norm.c norms and
 * rotary embeddings; attention.c; layers.c a pass through the layers; threads.c the team's barrier; draft.c trees that grow
 * level by level; pack.c weights to tiles; cpu.c what this CPU has. Knows nothing of Python,
 * models' names, or acceptance. */
#ifndef SPECDEC_NATIVE_H
#define SPECDEC_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default"))) /* all else stays inside (-fvisibility=hidden) */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SPECDEC_NATIVE

/* Before immintrin.h and everything else that is compiled. */
#pragma GCC target("prfchw,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,f16c,fma,avx2,amx-tile,amx-bf16,amx-int8")
#include <immintrin.h>

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* Kinds of tiles. A group of tiles [16 outputs x 32 inputs] has a head, with scales by output, and then each tile's codes.
 *
 *   kind  weight                       head                                                codes of a tile
 *   BF16  bf16                         -                                                   bf16[16][32]
 *   Q8    d q                          f16 d[16]                                           int8 q[16][32]
 *   Q4    d q + m                      f16 d[16], m[16]                                    nibbles
 *   Q5    d q + m                      f16 d[16], m[16]                                    nibbles, bits
 *   K4    (d sc) q - (dmin mn)         f16 d[16], dmin[16], uint8 sc[8][16], mn[8][16]     nibbles
 *   K5    (d sc) q - (dmin mn)         the same                                            nibbles, bits
 *   K6    (d sc) q                     f16 d[16], 32 unused bytes, int8 sc[8][2][16]       int8 q[16][32]
 *   I8    q, a scale by row            -                                                   int8[16][64]
 *   I4    d q                          f16 d[16][2], for even and odd quads of inputs      int8[8][64]
 *
 * nibbles: uint16[4][32]: nibble j of word [i][c] has the low bits of row 4 i + j, input c. bits: uint32[16]: bit c has the
 * fifth bit of input c. A group of K4, K5 and K6 is 8 tiles: the GGUF blocks of 16 rows. In K6, inputs below 16 and above have
 * a scale each; its codes of 6 bits take 8, since unpacking them would cost more time than reading does. I8 and I4 are for
 * drafts alone, and have 64 inputs: what they are multiplied with is rounded to 8 bits. I4 has two rows' nibbles in a byte, the
 * even one's above. */
enum { BF16, Q8, Q4, Q5, K4, K5, K6, I8, I4, KINDS };
enum { MOST_BLOCKS = 3 }; /* of tokens that are multiplied at once */

typedef struct {
    int tiles, head, codes; /* of a group: how many tiles, bytes of its head, bytes of each tile's codes */
} Group;

static const Group GROUPS[KINDS] = {{1, 0, 1024}, {1, 32, 512}, {1, 64, 256},  {1, 64, 320}, {8, 320, 256},
                                      {8, 320, 320}, {8, 320, 512}, {1, 0, 1024}, {1, 64, 512}};

/* Bytes of `tiles` tiles, in whole groups. */
static inline int64_t tiles_bytes(int kind, int64_t tiles) {
    const Group *g = GROUPS + kind;
    return tiles / g->tiles * (g->head + g->tiles * (int64_t)g->codes);
}

typedef uint16_t bf16;
typedef __m512 F;

extern int has_amx, has_vnni;

typedef struct {       /* rows of a map in one kind of tiles */
    int32_t kind, end;    /* end: number of tiles of outputs in this part and those before it */
    const uint8_t *tiles; /* [outputs / 16][in / 32] */
} Part;

typedef struct {       /* y = W x (+ bias) */
    int32_t kind, out, in, count; /* kind: of the first part (I8 and I4 maps have one); out: multiple of 16; in: multiple of 32 */
    const Part *parts;    /* [count] */
    const float *bias;    /* [out] or NULL */
    const float *scale;   /* I8: [out]; I4: what a row's products are too large by, [out] */
} Map;

typedef struct {       /* rows of numbers, in GGUF blocks or bf16 */
    int32_t type, columns; /* type: ggml's number of it, or -1: bf16 */
    int64_t stride;        /* bytes of a row */
    const uint8_t *data;
    const int32_t *order;  /* row i is order[i] of data; NULL: i */
} Table;

typedef struct {       /* low-rank terms beside a map: y += up (down x) */
    Map down;             /* bf16 [rank, in]; the ranks of its parts, each padded to a multiple of 32, one after the other */
    int32_t ks, unused;   /* rank / 32 of one part */
    const int32_t *first; /* [out / 16]: where an output tile's part begins in down's outputs, / 32; -1: no terms there */
    const uint8_t *up;    /* bf16 tiles [out / 16][ks] */
} LowRank;

typedef struct {
    Map qkv, out, gate_up, down;
    const float *norm_in, *norm_mlp, *norm_q, *norm_k; /* norm_q, norm_k: per head, or NULL */
} Layer;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim, inner, rotated; /* rotated: rotary dimensions of a head */
    float eps, scale;
    const Layer *layers;
} Model;

typedef struct {
    int32_t batch, tokens, lo, hi, start, threads, adapted, windows; /* start: first new cache slot */
    int32_t causal, unused;      /* each token sees the slots up to its own, within its window: there are no masks */
    const int32_t *spans;        /* by window kind: how many of the last slots are seen; 0: all */
    bf16 *x;                     /* [batch * tokens, hidden], in and out; unused in a passage */
    const int64_t *positions;    /* [batch * tokens] */
    const float *rotary;         /* [position][cosines, sines][rotated / 2] */
    bf16 **keys, **values;       /* by layer: [batch, kv_heads, capacity, head_dim] */
    const int32_t *capacity;     /* by layer: slots */
    const uint8_t *const *masks; /* by window kind: [batch, tokens, start + tokens], 1 = visible; NULL: all visible */
    const int32_t *window;       /* by layer: its kind */
    bf16 **taps;                 /* by layer, hidden states before it (hi: after the last) or NULL */
    const LowRank *const *low;   /* by layer: its four maps' low-rank terms, or NULL */
} Call;

/* pack.c */

void read_row(const Table *table, int64_t index, bf16 *to);

/* threads.c */

typedef struct {
    int32_t waiting __attribute__((aligned(64)));
    int32_t phase __attribute__((aligned(64)));
    int32_t asleep __attribute__((aligned(64)));
} Barrier;

void wait_for_team(Barrier *b, int n);

/* The share [*from, *to) of `count` items that thread `me` of `n` works on. */
static inline void split(int count, int me, int n, int *from, int *to) {
    *from = (int)((int64_t)count * me / n);
    *to = (int)((int64_t)count * (me + 1) / n);
}

/* Of `items` of work that `n` threads take in turns: how many turns there are. The items of the last ones are fewer than
 * threads, and all take part in each of them. */
static inline int turns_of(int items, int n) { return items / n + items % n; }

/* What thread `me` works on in a turn, and whether with all others. */
static inline int item_of(int turn, int items, int me, int n, int *together) {
    int whole = items / n;
    *together = turn >= whole;
    return *together ? whole * n + turn - whole : turn * n + me;
}

/* amx.c, avx512.c */

typedef struct { /* what is multiplied: `count` tiles, bf16 ones `step` bytes apart; tokens `stride` bytes apart, blocks of them `block` */
    const uint8_t *tiles, *x;
    int64_t step, stride, block;
    int count;
} Side;

void enter_tiles(void);
void leave_tiles(void);
void amx_product(int kind, const Side *a, const Side *b, int blocks, float *sums);
void amx_int8_product(const Side *a, int tokens, const float *scale, float *sums);
void to_vnni_int8(const uint32_t *vnni, int features, int blocks, uint8_t *int8);
void row_product(int kind, const Side *a, const Side *b, int tokens, float *sums);
void row_int8_product(int kind, const Side *a, int tokens, const float *scale, float *sums);
void to_rows_bf16(const uint32_t *vnni, int features, int tokens, uint32_t *rows);
void to_rows_int8(int kind, const uint32_t *rows, int features, int tokens, uint8_t *int8);

/* linear.c */

/* Bytes of a block of vnni_int8, or of rows_int8. */
static inline int64_t int8_block_bytes(int features) { return 16 * (int64_t)features + 128; }

/* Bytes of a block of what `map` reads, for the layout that `input_of` makes. */
static inline int64_t block_bytes(const Map *map) { return map->kind >= I8 ? int8_block_bytes(map->in) : 32 * (int64_t)map->in; }

/* Bytes of `input_of`'s scratch. */
static inline int64_t scratch_bytes(int features, int blocks) { return (blocks + 1) * (32 * (int64_t)features + 128); }

static inline const uint32_t *from_block(const Map *map, const uint32_t *x, int b) { return x + b * block_bytes(map) / 4; }

void product(const Map *map, const LowRank *low, int t, const uint32_t *x, const uint32_t *down_x, int tokens, float *sums);
const uint32_t *input_of(const Map *map, const uint32_t *x, int tokens, uint8_t *scratch);

/* norm.c */

void norm(const float *x, const float *weight, int features, float eps, uint32_t *out);
void to_blocks(const bf16 *rows, int count, int features, float *fm);
void from_blocks(const float *fm, int first, int end, int features, bf16 *rows);
void rotate(float *head, const Model *m, const float *weight, const float *cos, const float *sin);

/* attention.c */

void attend(const bf16 *keys, const bf16 *values, int count, int d, const uint32_t *queries, int columns,
            const uint16_t *visible, int bit, float scale, int once, float *p, float *out);

/* layers.c */

static inline void *allocate(size_t bytes) { /* aligned to a cache line; the memory of a call comes back to the next */
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

typedef struct {
    const Model *m;
    const Call *c;
    int rows, blocks, group, column_blocks, slots, ranks;
    size_t scored, int8_input, own;              /* a thread's scratch: where scores and vnni_int8 begin in it, its size */
    float *x, *qkv, *cos, *sin;              /* feature_major; cos and sin [block][rotated / 2][16] */
    uint32_t *attended, *inner, *ranked[2];  /* vnni_bf16 */
    bf16 *queries;                           /* [rows, heads, head_dim] */
    uint16_t **visible;                      /* by window kind: [batch][column block][slots], or NULL */
    uint8_t *scratch;                        /* by thread: the normed block, attention's scores, vnni_int8 of the widest input */
    Barrier barrier;
} Pass;

int begin_pass(Pass *p, const Model *m, const Call *c, int slots, int widest);
void end_pass(Pass *p);
int bind_cache(Pass *p, const Call *c);
void unbind_cache(Pass *p);
void run_layers(Pass *p, int me, int n);

#endif
#endif
