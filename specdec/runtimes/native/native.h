/* The native runtime's kernels: whole decoder layers of a Llama-like model in one call, for x86 CPUs with AVX2, FMA and F16C,
 * or with AVX-512 BF16, and with AMX, and for Arm CPUs with dot products, or matrix products of bytes.
 *
 * They exist because a token's result must not depend on what else is in its pass. Speculative decoding scores several
 * tokens at once and compares them with what one at a time would have given; usual libraries choose another order of sums
 * for another number of rows. Here every token is computed by the same operations in the same order whatever is scored
 * beside it: attention adds the visible keys in their order, and an invisible one adds an exact zero. So a token's logits do
 * not depend, to the last bit, on how many tokens a pass has, nor on the cache slots of a tree's branches. A model in blocks
 * whose activations are rounded to 8 bits has the same logits in every instruction set, too. Those of bf16 products differ.
 *
 * Weights lie in tiles of 16 outputs x 32 inputs, in bf16, or as the codes of blocks. Products of blocks (integer.c) are
 * whole numbers: codes of 16 outputs and 4 inputs fill a vector, which is multiplied with 4 inputs of a token, and a block's
 * sum is scaled in float. It takes a token's activations in 8 bits, with a scale for 32 of them. bf16 tiles are multiplied
 * with 16 tokens at once in AMX, with one token after another in AVX-512 and, as floats, in AVX2 and NEON. What only
 * drafts read need not be exact: it is rounded to blocks when it is packed.
 *
 * Layouts of activations, for blocks of 16 tokens ("lanes"):
 *   feature_major  float [features][16]
 *   vnni_bf16      bf16 pairs [features / 2][16]: what AMX multiplies with bf16 tiles
 *   rows_bf16      bf16 [16 tokens][features]: what AVX-512 multiplies
 *   rows_f32       float [16 tokens][features]: what AVX2 and NEON multiply; the numbers are bf16
 *   rounded        Rounded [features / 32][tokens]: what blocks are multiplied with
 *
 * Files: kernels_*.c build the kernels for an instruction set, from kernels/: simd_*.h vectors of 16 numbers (neon.h lets AVX2's
 * work on Arm), simd.h what is made of them; avx512.c, amx.c and avx2.c products of bf16 tiles, i8mm.h products of bytes; and what
 * is written once for all of them: integer.c products of blocks; norm.c norms and rotary embeddings; linear.c linear maps;
 * attention.c; layers.c a pass through the layers; delta_rule.c their recurrent mixers; mixture.c their mixtures of experts; pack.c
 * weights to tiles; draft.c trees that grow level by level. Another instruction set is another simd_*.h, products and kernels_*.c.
 * threads.c has the team's barrier, cpu.c what this CPU has. Nothing here knows of Python, models' names, or acceptance. */
#ifndef SPECDEC_NATIVE_H
#define SPECDEC_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default"))) /* all else stays inside (-fvisibility=hidden) */

#if defined(__GNUC__) && ((defined(__x86_64__) && defined(__linux__)) \
    || (defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))))
#define SPECDEC_NATIVE

#ifdef _OPENMP
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

/* Kinds of tiles. A group of tiles [16 outputs x 32 inputs] has a head, with scales by output, and then each tile's codes.
 *
 *   kind  weight                     head                                                codes of a tile
 *   BF16  bf16                       -                                                   bf16[16][32]
 *   Q8    d (q - 128)                f16 d[16]                                           uint8 q[8][16][4]
 *   Q4    d q + m                    f16 d[16], m[16]                                    nibbles
 *   Q5    d q + m                    f16 d[16], m[16]                                    nibbles, 1 bit
 *   K4    (d sc) q - (dmin mn)       f16 d[16], dmin[16], uint8 sc[8][16], mn[8][16]     nibbles
 *   K5    (d sc) q - (dmin mn)       the same                                            nibbles, 1 bit
 *   K6    (d sc) (q - 32)            f16 d[16], 32 unused bytes, int8 sc[8][2][16]       nibbles, 2 bits
 *   MX    d (E2M1[q] - 12)           uint8 e[16]: d is 2 to e - 127, or 0 if e is 0      nibbles
 *
 * Codes stand as integer products take them: [quad of inputs][output][input of the quad], bytes. nibbles: uint8[4][16][4], quads
 * i and, above, i + 4. 1 bit: uint8[16][4], bit i is of quad i. 2 bits: uint8[2][16][4], bits 2 i of quads i and i + 4. A group
 * of K4, K5 and K6 is 8 tiles: the GGUF blocks of 16 rows. In K6, inputs below 16 and above have a scale each. */
enum { BF16, Q8, Q4, Q5, K4, K5, K6, MX, KINDS };
enum { AVX2 = 1, AVXVNNI, AVX512, AMX, NEON = 1, I8MM }; /* instruction sets, of x86 and of Arm */
enum { SILU, GELU, CLAMPED }; /* activations a(gate) up: GELU is tanh's; CLAMPED: gate sigmoid(alpha gate) (up + 1), both within limit */
enum { MOST_BLOCKS = 3 }; /* of tokens that are multiplied at once */
enum { BUFFERS = 2, WIDEST_HEAD = 512 }; /* of a sequence's cache, each with layers whose heads are alike; largest size of a head */
enum { CACHE16, CACHE8, TOGETHER = 32 }; /* rows of the cache, a slot of a head each: bf16[d], or int8[d] and bf16[d / TOGETHER], scales */

/* Bytes of a row of the cache. */
static inline int64_t cache_row(int kind, int d) { return kind == CACHE8 ? d + 2 * d / TOGETHER : 2 * d; }

typedef struct {
    int tiles, head, codes; /* of a group: how many tiles, bytes of its head, bytes of each tile's codes */
} Group;

static const Group GROUPS[KINDS] = {{1, 0, 1024}, {1, 32, 512}, {1, 64, 256}, {1, 64, 320}, {8, 320, 256}, {8, 320, 320}, {8, 320, 384},
    {1, 16, 256}};

/* Bytes of `tiles` tiles, in whole groups. */
static inline int64_t tiles_bytes(int kind, int64_t tiles) {
    const Group *g = GROUPS + kind;
    return tiles / g->tiles * (g->head + g->tiles * (int64_t)g->codes);
}

typedef uint16_t bf16;

typedef struct {       /* output rows of a map in one kind of tiles */
    int32_t kind, end;    /* end: number of output tiles of this part and those before it */
    const uint8_t *tiles; /* [outputs / 16][in / 32] */
} LinearPart;

typedef struct {       /* a linear layer: y = scale (W x (+ bias)), and then cap tanh(y / cap) unless `cap` is 0 */
    /* rounded: activations are in 8 bits, and no part is bf16; out: a multiple of 16; in: a multiple of 32; count: number of parts */
    int32_t rounded, out, in, count;
    float scale, cap;
    const LinearPart *parts;    /* [count] */
    const float *bias;    /* [out] or NULL */
    const uint8_t *proxy;      /* Q4 tiles of weights in Q8, for the argmax by bounds; NULL: none */
    const float *error_bounds; /* [out]: largest difference of an output by the proxy, for an input of length 1 */
} Linear;

typedef struct {       /* rows of numbers, in GGUF blocks or bf16 */
    int32_t type, columns; /* type: ggml's number, or -1: bf16 */
    int64_t stride;        /* bytes of a row */
    const uint8_t *data;
    const int32_t *order;  /* row i is order[i] of data; NULL: i */
    float scale;           /* of what is read, after it is rounded */
} Table;

typedef struct {
    Linear qkv, out, gate_up, down;
    Linear router;              /* [experts, hidden]; the layer's MLP is then a mixture: gate_up and down are those of an
                              * expert for all tokens, whose gate is the output behind those of the others, or unused */
    Linear rates;               /* of a recurrent layer: each value head's strength of writing and, from a tile of their own, rate of
                              * decay. Its `qkv` has the inputs of the convolution (queries, keys, values), and the gates of its result */
    const Linear *gates, *sums; /* [experts]: gate_up and down of each, all with inputs of the same form; NULL: no mixture */
    const float *norm_in, *norm_mlp;         /* of the inputs of attention and the MLP; NULL: there is none, here and below */
    const float *norm_attended, *norm_out;   /* of their results, before these are added */
    const float *norm_q, *norm_k;            /* of queries and keys */
    const float *sinks;                      /* [heads]: scores of nothing, beside those of the keys; NULL: there are none */
    const float *convolution;                /* [taps][channels] of a recurrent layer; NULL: it has attention */
    const float *decay, *decay_bias;         /* [value_heads] of it: minus the factor of the rate of decay, and what is added before */
    const float *norm_mixed;                 /* [value_dim] of it: of each head's result, before the gate */
    /* The layer's own embedding of each token: x += norm_added(embedded_out(act(embedded_gate(x)) e)) with e the sum of the token's
     * row in `embedded` and of norm_embedded(embedded_in(first)), over the root of 2; first: the token's row in the model's table.
     * Linear layers without outputs: there is no such embedding. */
    Linear embedded_in, embedded_gate, embedded_out;
    Table embedded;
    const float *norm_embedded, *norm_added;
    float scale;                             /* factor of the layer's output, which comes after a norm */
    int32_t rotary_q, rotary_k, rotated;     /* which of a call's tables rotates them; -1: none. Rotary dimensions of a head */
    int32_t place, tiled;                    /* place: index of the layer among the layers of its buffer, or among the
                                              * recurrent ones; tiled: `out` takes the results of the first value heads of all key
                                              * heads, then of the second ones, and so on */
    int32_t buffer, reads;                   /* buffer of its keys and values; whether they are another layer's, in the same place */
} Layer;

typedef struct { int32_t count, size; } Heads; /* of keys in a buffer: number and size of heads; 0: there is no such buffer */

typedef struct {
    int32_t hidden, heads, inner, rotated; /* rotated: rotary dimensions in a call's tables */
    Heads buffers[BUFFERS];
    int32_t rounded; /* activations in 8 bits: attention is then the same, to the last bit, in every instruction set */
    int32_t experts, top_k, normalize_top_k; /* experts of a layer; experts that a token uses; whether their weights are scaled to sum 1 */
    /* round_after_weight: norms round only after their weights. across: one norm covers all heads of the queries, or of the keys.
     * tables: number of rotary tables. gated: each query head is followed by a gate for its result. normed_values: values also
     * have a norm over each head, without weights. */
    int32_t round_after_weight, activation, across, tables, gated, normed_values;
    int32_t recurrent, key_heads, value_heads, key_dim, value_dim, taps; /* number of recurrent layers; their heads; convolution taps */
    float eps, scale, cap, limit, alpha; /* of norms; scale of scores, and their cap as in Linear; limit, alpha: of CLAMPED */
    /* Called before a layer's experts are read; NULL: all experts are in memory. If it returns other than 0, experts cannot be read,
     * and the pass goes on without them. x, logits: the residual [block][hidden][16] and the router's outputs [block][features][16]. */
    int (*demand)(int layer, int count, const int32_t *grouped, int rows, const float *x, const float *logits);
    const Table *embedding; /* [vocabulary, hidden], if layers have embeddings of their own; else unused */
    const Layer *layers;
} Model;

typedef struct {                 /* a sequence of a call; the tokens of its sequences follow one another */
    int32_t tokens, start;       /* number of its tokens in the call; its first new cache slot */
    int32_t committed, filled;   /* slots below `committed` are numbered by position; layers that read keys of a layer before the
                                  * call's see no slot from `filled` on */
    int32_t capacity[BUFFERS];   /* number of slots */
    uint8_t *keys[BUFFERS], *values[BUFFERS]; /* [layers with them][heads][capacity] rows of the cache */
    const uint8_t *const *trees; /* by window kind: [tokens][start + tokens - committed], 1 = visible, every slot before is in
                                  * sight of the window alone; NULL: a token sees the slots up to its own, within its window */
    int32_t held, slots;         /* in recurrent layers: number of uncommitted tokens before the call's; slots of `inputs` */
    uint8_t *states, *ahead;     /* [recurrent layers][state_bytes]: states after the committed tokens that are not pending; out, or
                                  * NULL: states after the call's tokens, whose inputs are then not stored */
    bf16 *inputs;                /* [recurrent layers][slots][input_width]: of the pending tokens, or else of the uncommitted ones */
    int32_t *pending;            /* [recurrent layers]: number of pending tokens */
} Sequence;

typedef struct {
    int32_t count, tokens;       /* number of sequences, and of all their tokens */
    int32_t lo, hi, threads;     /* layers [lo, hi); number of threads */
    int32_t windows, cache;      /* number of window kinds; CACHE16 or CACHE8 */
    int32_t near;                /* committed slots but the first ones (attention.c: KEYS) and the last `near` are not seen; 0: all are */
    const Sequence *sequences;
    const int32_t *spans;        /* by window kind: how many of the last slots are seen; 0: all */
    bf16 *x;                     /* [tokens, hidden], in and out; unused when drafting */
    const int64_t *positions;    /* [tokens] */
    const int32_t *ids;          /* [tokens], if layers have embeddings of their own; else unused */
    const float *const *rotary;  /* [tables]: [position][cosines, sines][rotated / 2] */
    const int32_t *window;       /* by layer: its kind */
    bf16 **taps;                 /* by layer, hidden states before it (hi: after the last) or NULL */
    float *routed;               /* [tokens, hi, experts]: logits of the routers, out, or NULL */
} Call;

typedef struct {        /* a projection, and the layers after it */
    const Linear *projection;        /* its inputs, each divided by its RMS: the residual, the previous final state (, `carried`) */
    const bf16 *carried;    /* [sequences, hidden]: input states of the layers, of the token before each root */
    const Model *model;     /* the first stage has layers; the last may have none (NULL) */
    const Call *call;       /* for a token of each sequence at its first free slot, without trees */
} Stage;

/* how a sequence's tokens are sampled: the argmax of logits / temperature + Gumbel noise (speculation/sampling.py) */
typedef struct {
    uint64_t seed, stream;
    int64_t place;          /* the text's length up to the root: the noise's position of the next token */
    float sharpness, top_p, min_p; /* 1 / temperature; 0: greedy */
    int32_t top_k;
} Sampled;

typedef struct {        /* the tree of another source: what it has after a sequence's root */
    int32_t count;
    const int32_t *tokens, *parents; /* parent 0: the root, i + 1: node i */
    const float *p;         /* what the source says: the probability of each node after its parent */
} Given;

typedef struct {        /* a tree that grows from one root, level by level, or a chain with siblings for each of several sequences */
    int32_t stages, levels, width, sequences; /* width: children of a node, and of a tree the nodes of a level that get any */
    const int32_t *roots;   /* [sequences] */
    const Stage *stage;
    const Table *embedding; /* [vocabulary, hidden] */
    const bf16 *final;      /* [sequences, hidden]: final states of the token before each root */
    const Linear *head[2];     /* the heads, one behind the other; the second may be NULL */
    int32_t outputs[2];     /* number of outputs of each head */
    const int64_t *tokens;  /* [outputs]: their tokens, or NULL: the outputs are the tokens */
    const float *norm;
    float eps, unit_eps;    /* of the final norm, of the projections' */
    float level, node;      /* growing ends when the next level is expected to bring less than `level`: over the nodes that get children, */
                            /* the probability of the path times `rates`, as far as it exceeds `node` */
    const float *rates;     /* [levels]: how likely a level has the right token after a right path */
    /* [sequences][3][KNOTS], calibration tables (calibrate.h), or NULL: no calibration. Of the heads' probabilities; of the other
     * source's where the heads have no candidates; and of the other source's where the heads have candidates. */
    const float *tables;
    const Given *given;     /* [sequences], or NULL: no other source */
    /* out: [levels * width * max(width, sequences) + all given nodes]: log-probabilities of the candidates' paths, and each
     * candidate's raw probability after its parent by the heads (0: only the other source has the candidate). */
    float *scores, *raw;
    int32_t *ids, *parents; /* out: tokens of the candidates; parents: i + 1 is candidate i, -r is the root of sequence r */
    int (*mask)(int rows, const int32_t *nodes); /* NULL: all tokens are allowed. Called before a level's pass, by one thread, to set */
    const uint8_t *const *allowed;  /* `allowed`, the mask of each of its nodes (NULL: no token); returns 0, or else growing ends */
    const uint8_t *forbidden; /* [sequences, outputs of the second head]: those that a sequence may not draft, or NULL */
    const Sampled *sampled; /* [sequences], or NULL: all are greedy */
} TreeDraft;

/* Inputs of the convolution of a recurrent layer; numbers of a token's inputs: those, strengths and rates; bytes of a state: matrices
 * [value_heads][value_dim / 16][key_dim][16] of float, and the convolution's last inputs, bf16 [taps - 1][channels]. */
static inline int in_tiles(int count) { return (count + 15) / 16 * 16; }
static inline int channels_of(const Model *m) { return 2 * m->key_heads * m->key_dim + m->value_heads * m->value_dim; }
static inline int input_width(const Model *m) { return channels_of(m) + 2 * in_tiles(m->value_heads); }
static inline int64_t matrices_bytes(const Model *m) { return 4 * (int64_t)m->value_heads * m->value_dim * m->key_dim; }
static inline int64_t state_bytes(const Model *m) { return matrices_bytes(m)
    + (2 * (int64_t)(m->taps - 1) * channels_of(m) + 63) / 64 * 64; }

/* threads.c */

enum { MOST_SHARING = 64, MOST_HELPED = 8 }; /* largest team in which threads help one another; how many others a thread helps */

typedef struct {
    int32_t waiting __attribute__((aligned(64)));
    int32_t phase __attribute__((aligned(64)));
    int32_t asleep __attribute__((aligned(64)));
    struct { int32_t items __attribute__((aligned(64))); } taken[MOST_SHARING]; /* from the share of each thread (next_item) */
} Barrier;

/* Wait for all `n` threads, and set the counts of taken items to 0. */
void wait_for_team(Barrier *b, int n);

/* The share [*from, *to) of `count` items that thread `me` of `n` works on. */
static inline void split(int count, int me, int n, int *from, int *to) {
    *from = (int)((int64_t)count * me / n);
    *to = (int)((int64_t)count * (me + 1) / n);
}

/* `count` items of work, each to be done for `groups` groups, that a team shares between two waits. Initialize as {barrier, count,
 * groups, me, n}. */
typedef struct {
    Barrier *barrier;
    int count, groups, me, n;
    int group;     /* of the latest item */
    int turn, own; /* items come from the share of thread me + turn; number of items taken, where threads do not help one another */
} Work;

/* The next item for the thread, -1: there is none. A thread takes those of its own share, then what slower threads have left. */
static inline int next_item(Work *w) {
    for (const int turns = w->n <= MOST_SHARING ? w->n : 1; w->turn < turns && w->turn <= MOST_HELPED; w->turn++) {
        int owner = (w->me + w->turn) % w->n, from, to, at;
        split(w->count, owner, w->n, &from, &to);
        const int share = (to - from) * w->groups;
        int32_t *taken = turns > 1 ? &w->barrier->taken[owner].items : &w->own;
        if (__atomic_load_n(taken, __ATOMIC_RELAXED) >= share || (at = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) >= share) continue;
        w->group = at / (to - from);
        return from + at % (to - from);
    }
    return -1;
}

/* The number of turns in which `n` threads do `items` of work. If fewer items than threads are left, all threads share each. */
static inline int turns_of(int items, int n) { return items / n + items % n; }

/* The item of thread `me` in a turn, and whether all threads share it. */
static inline int item_of(int turn, int items, int me, int n, int *together) {
    int whole = items / n;
    *together = turn >= whole;
    return *together ? whole * n + turn - whole : me * whole + turn;
}

extern int has_amx;

static inline void *allocate(size_t bytes) { /* aligned to a cache line; the allocator reuses the memory of the last call */
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

#endif
#endif
