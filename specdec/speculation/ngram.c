/* N-grams: which tokens followed where a text went on alike before, how likely each is now, and the best-first tree of them.
 *
 * Texts lie one behind the other in a window. From each place chains lead to earlier places behind the same last token, and
 * behind the same last two, the latest first. Texts that never change may be sorted instead: by what precedes each place, so
 * that the longest matches lie side by side. The probability of a follower is blended from the shortest match to the longest
 * (as PPM escapes from the longest to the shortest, Cleary and Witten 1984): what more and longer matches say overrules what
 * fewer and shorter ones say, and a static prior. A learned drafter's tree is merged in. Knows tokens and numbers, no model and
 * no Python. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../runtimes/native/calibrate.h"
#include "../runtimes/native/gumbel.h"

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum {
    LONGEST = 16,     /* tokens of a match that are compared */
    OCCURRENCES = 32, /* places that are read of a chain, and that many times */
    VISITS = 4,       /* as many links are followed */
    SURE = 4,         /* tokens of a node's longest match, from which on no others are looked for than its parent's */
    SINGLES = 8,      /* places behind the last token alone, where none is behind the last two */
    TOKENS = 96,      /* followers of a place that are kept apart */
    MOST_NODES = 64,  /* of a tree */
};
static const float RECENCY = 0.9f; /* weight of an occurrence over that of the next later one */
static const float ESCAPE = 8; /* n matches of L tokens count n / (n + ESCAPE / L^1.5) */

typedef struct {
    int32_t *ids;         /* [size], by place; -1: between texts */
    uint32_t *one, *two;  /* [size]: how far back the place before behind the same token, the same two, is; 0: there is none */
    uint32_t *ones, *twos; /* [size], by hash: the latest such place, and 1 */
    int64_t end;          /* places so far; the window has the last `size` */
    int64_t size, most;   /* powers of two: the window's, and what it may grow to */
    const uint32_t *order; /* [end]: the places, sorted by the tokens before each, the last first; NULL: there are chains */
} Texts;

typedef struct {
    int32_t tokens;        /* V */
    const int32_t *begin;  /* [V + 1]: where each token's followers are */
    const int32_t *after;  /* [..], likeliest first */
    const float *p;
} Prior;

typedef struct {
    const int32_t *text;   /* the last tokens of the text, the root last */
    int32_t length;        /* at most LONGEST */
    int32_t limit, nodes;  /* most levels, and most nodes */
    int32_t sources;       /* texts that are matched, at most one of them sorted; later ones overrule earlier ones */
    float least;           /* probability below which a node is not taken */
    int32_t priced;        /* numbers of `price` */
    const float *price;    /* of scoring 0, 1, .. nodes, in tokens */
    const Prior *prior;    /* NULL: none */
    const Texts *const *source;
    const float *weight;   /* by source: how many times the evidence of an occurrence counts */
    const float *table;    /* calibrated probabilities of the candidates found here, or NULL: as they are */
    const float *beside;   /* the same where the learned drafter has others */
    int32_t learned;       /* nodes of a learned drafter's tree, parents first */
    const int32_t *learned_tokens, *learned_parents; /* parent 0: the root, i + 1: node i */
    const float *learned_p;      /* probability of each node after its parent; 0: the drafter does not have it */
    const float *learned_table;  /* as `table` */
    int32_t sampled;             /* whether tokens are drawn by noise, of: */
    uint64_t seed, stream;
    int64_t position;            /* of the token behind the root */
    const uint8_t *(*allowed)(int32_t node);     /* [V]: what may follow a node of the tree; its NULL: nothing. NULL: anything */
    int32_t *tokens, *parents;                   /* out: [nodes] */
    float *values;                               /* out: [nodes], probability of each path */
    float *own_raw, *learned_raw;                /* out: [nodes], what each source says of a node after its parent; 0: nothing */
} Growth;

typedef struct { int32_t token, length; uint32_t place; } Occurrence;
typedef struct { int32_t count; Occurrence found[OCCURRENCES]; } Matches;
typedef struct { int32_t count, token[TOKENS], learned[TOKENS]; float p[TOKENS], own[TOKENS], said[TOKENS]; } Followers;
typedef struct { float value, own, said; int32_t token, parent, depth, learned; } Node;

static uint32_t hash(uint32_t a, uint32_t b, int64_t size) {
    uint64_t h = (((uint64_t)a << 32) | b) * 0x9E3779B97F4A7C15ull;
    return (uint32_t)(h >> 32) & (uint32_t)(size - 1);
}

static uint32_t link(uint32_t *heads, uint32_t at, int64_t place, int64_t size) {
    uint32_t before = heads[at], back = (uint32_t)place + 1 - before;
    heads[at] = (uint32_t)place + 1;
    return before && back < (uint64_t)size ? back : 0;
}

/* Enter a place whose token is there: what precedes it leads to it. */
static void enter(Texts *t, int64_t place) {
    int64_t mask = t->size - 1;
    int32_t last = place > 0 ? t->ids[(place - 1) & mask] : -1, other = place > 1 ? t->ids[(place - 2) & mask] : -1;
    int there = t->ids[place & mask] >= 0 && last >= 0;
    t->one[place & mask] = there ? link(t->ones, hash(0xffffffffu, last, t->size), place, t->size) : 0;
    t->two[place & mask] = there && other >= 0 ? link(t->twos, hash(other, last, t->size), place, t->size) : 0;
}

static int resize(Texts *t, int64_t size) {
    int32_t *ids = realloc(t->ids, sizeof *ids * size);
    if (ids) t->ids = ids;
    uint32_t *lists[4] = {t->one, t->two, t->ones, t->twos};
    int failed = !ids;
    for (int i = 0; i < 4; i++) {
        uint32_t *list = realloc(lists[i], sizeof *list * size);
        if (list) lists[i] = list;
        failed |= !list;
    }
    t->one = lists[0], t->two = lists[1], t->ones = lists[2], t->twos = lists[3];
    if (failed) return -1; /* the old size goes on: its part of each list is as it was */
    memset(t->ids + t->size, -1, sizeof *ids * (size - t->size));
    memset(t->ones, 0, sizeof *t->ones * size), memset(t->twos, 0, sizeof *t->twos * size);
    t->size = size;
    for (int64_t place = 0; place < t->end; place++) enter(t, place);
    return 0;
}

EXPORT void specdec_texts_close(Texts *t) {
    if (t && !t->order) free(t->ids), free(t->one), free(t->two), free(t->ones), free(t->twos);
    free(t);
}

/* A window of at most `most` tokens, a power of two; `size` at first. NULL without memory. */
EXPORT Texts *specdec_texts_open(int64_t size, int64_t most) {
    Texts *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->most = most;
    if (resize(t, size < most ? size : most)) return specdec_texts_close(t), NULL;
    return t;
}

/* Go on with the text; -1 ends one. Returns 0, or -1 without memory: the window is then as large as it gets. */
EXPORT int specdec_texts_add(Texts *t, const int32_t *ids, int64_t count) {
    int failed = 0;
    for (int64_t i = 0; i < count; i++) {
        if (t->end == t->size && t->size < t->most && !failed) failed = resize(t, 2 * t->size);
        t->ids[t->end & (t->size - 1)] = ids[i];
        enter(t, t->end++);
    }
    return failed;
}

/* The token `back` + 1 places before a place; -1: the texts begin behind it. */
static int32_t before(const int32_t *ids, uint32_t place, int back) {
    return (uint32_t)back < place ? ids[place - 1 - back] : -1;
}

/* Sort places that are alike in `depth` tokens before each by LONGEST tokens, or up to the beginning of their texts:
 * three-way quicksort, a token at a time. */
static void sort(const int32_t *ids, uint32_t *places, int64_t count, int depth) {
    uint64_t random = (uint64_t)count;
    while (count > 1 && depth < LONGEST) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        const int32_t pivot = before(ids, places[(random >> 33) % (uint64_t)count], depth);
        int64_t less = 0, at = 0, more = count;
        while (at < more) {
            const uint32_t place = places[at];
            const int32_t token = before(ids, place, depth);
            if (token < pivot) places[at++] = places[less], places[less++] = place;
            else if (token > pivot) places[at] = places[--more], places[more] = place;
            else at++;
        }
        /* The largest part goes on here, so that calls are not nested deeper than the logarithm of the count. */
        const int64_t parts[3][3] = {{0, less, depth}, {less, more - less, pivot < 0 ? LONGEST : depth + 1}, {more, count - more, depth}};
        int largest = 0;
        for (int i = 1; i < 3; i++) largest = parts[i][1] > parts[largest][1] ? i : largest;
        for (int i = 0; i < 3; i++)
            if (i != largest) sort(ids, places + parts[i][0], parts[i][1], (int)parts[i][2]);
        places += parts[largest][0], count = parts[largest][1], depth = (int)parts[largest][2];
    }
}

/* Sort all places of texts of `count` tokens, at most 2^32 - 1, into `order`. */
EXPORT void specdec_texts_sort(const int32_t *ids, uint32_t *order, int64_t count) {
    for (int64_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    sort(ids, order, count, 0);
}

/* Texts of `count` tokens that never change, and their places in order; both stay the caller's. NULL without memory. */
EXPORT Texts *specdec_texts_view(const int32_t *ids, const uint32_t *order, int64_t count) {
    Texts *t = calloc(1, sizeof *t);
    if (t) t->ids = (int32_t *)ids, t->order = order, t->end = count;
    return t;
}

/* How many tokens before a place are those before `end`, at most `length`. */
static int matched(const Texts *t, uint32_t place, const int32_t *end, int length) {
    int same = 0;
    while (same < length && before(t->ids, place, same) == end[-1 - same]) same++;
    return same;
}

/* The matches of a node in sorted texts: those of its parent that go on with its token. None where they are short. */
static int follow(const Texts *t, const Matches *parent, int32_t token, Occurrence *found) {
    int count = 0;
    for (const Occurrence *o = parent->found; o < parent->found + parent->count; o++) {
        const int64_t place = (int64_t)o->place + 1;
        if (o->token != token || place >= t->end || t->ids[place] < 0) continue;
        found[count++] = (Occurrence){t->ids[place], o->length < LONGEST ? o->length + 1 : LONGEST, (uint32_t)place};
    }
    return count && found->length >= SURE ? count : 0;
}

/* As `find`, in sorted texts: the longest matches first, of at least two tokens. They lie around the place of the text itself. */
static int find_sorted(const Texts *t, const int32_t *end, int length, Occurrence *found) {
    int64_t low = 0, high = t->end;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const int same = matched(t, t->order[middle], end, length);
        if (same < length && before(t->ids, t->order[middle], same) < end[-1 - same]) low = middle + 1;
        else high = middle;
    }
    for (int64_t i = low - OCCURRENCES; i < low + OCCURRENCES; i++) /* what is read below, all at once */
        if (i >= 0 && i < t->end && t->order[i]) __builtin_prefetch(t->ids + t->order[i] - 1);
    int count = 0, left = low ? matched(t, t->order[low - 1], end, length) : 0, right = low < t->end ? matched(t, t->order[low], end, length) : 0;
    for (high = low--; count < OCCURRENCES && (left > 1 || right > 1);) {
        const int longest = left > right ? left : right;
        const uint32_t place = t->order[left > right ? low-- : high++];
        if (t->ids[place] >= 0) found[count++] = (Occurrence){t->ids[place], longest, place};
        if (left > right) left = low >= 0 ? matched(t, t->order[low], end, length) : 0;
        else right = high < t->end ? matched(t, t->order[high], end, length) : 0;
    }
    return count;
}

/* The places from which the text that ends before `end`, `length` tokens of it, went on before: the latest first. */
static int find(const Texts *t, const int32_t *end, int length, Occurrence *found) {
    if (t->order) return find_sorted(t, end, length, found);
    int64_t mask = t->size - 1;
    for (int pair = length > 1; pair >= 0; pair--) {
        const uint32_t *chain = pair ? t->two : t->one;
        uint32_t head = pair ? t->twos[hash(end[-2], end[-1], t->size)] : t->ones[hash(0xffffffffu, end[-1], t->size)];
        int count = 0, most = pair ? OCCURRENCES : SINGLES;
        uint32_t place = head - 1;
        for (int visit = 0; head && count < most && visit < VISITS * OCCURRENCES; visit++) {
            uint32_t back = (uint32_t)t->end - place;
            if (!back || back + LONGEST >= (uint64_t)t->size + (t->end <= t->size ? LONGEST + 1 : 0)) break; /* gone */
            int alike = 0, least = 1 + pair;
            while (alike < length && t->ids[(place - 1 - alike) & mask] == end[-1 - alike]) alike++;
            if (alike >= least) found[count++] = (Occurrence){t->ids[place & mask], alike, place};
            if (!chain[place & mask]) break;
            place -= chain[place & mask];
        }
        if (count) return count;
    }
    return 0;
}

static int follower(Followers *f, int32_t token) {
    for (int i = 0; i < f->count; i++)
        if (f->token[i] == token) return i;
    if (f->count == TOKENS) return -1;
    f->token[f->count] = token, f->p[f->count] = f->said[f->count] = 0, f->learned[f->count] = -1;
    return f->count++;
}

/* Blend what followed into `f`, from all matches to the longest ones. */
static void blend(Followers *f, const Occurrence *found, int count, float weight) {
    static const int LENGTHS[] = {1, 2, 3, 4, 6, 9, 13, LONGEST + 1};
    int at[OCCURRENCES];
    float recency[OCCURRENCES], w = 1;
    for (int i = 0; i < count; i++, w *= RECENCY) at[i] = follower(f, found[i].token), recency[i] = w;
    for (int level = 0; level < 7; level++) {
        float total = 0;
        int own = 0;
        for (int i = 0; i < count; i++)
            if (found[i].length >= LENGTHS[level]) total += recency[i], own |= found[i].length < LENGTHS[level + 1];
        if (!own) continue; /* the next level has the same places */
        float share = weight * total / (weight * total + ESCAPE * powf((float)LENGTHS[level], -1.5f));
        for (int i = 0; i < f->count; i++) f->p[i] *= 1 - share;
        for (int i = 0; i < count; i++)
            if (found[i].length >= LENGTHS[level] && at[i] >= 0) f->p[at[i]] += share * recency[i] / total;
    }
}

/* What follows a node, whose text ends before `end`, by n-grams: `p`. matches: [number + 1], of each node in sorted texts. */
static void by_ngrams(const Growth *g, const Node *node, int32_t number, const int32_t *end, int length, Matches *matches, Followers *f) {
    Matches other;
    matches[number].count = 0;
    f->count = 0;
    if (g->prior && end[-1] < g->prior->tokens)
        for (int i = g->prior->begin[end[-1]]; i < g->prior->begin[end[-1] + 1]; i++) {
            int at = follower(f, g->prior->after[i]);
            if (at >= 0) f->p[at] = g->prior->p[i];
        }
    for (int s = 0; s < g->sources; s++) {
        const Texts *t = g->source[s];
        Matches *own = t->order ? matches + number : &other;
        own->count = t->order && number ? follow(t, matches + node->parent, node->token, own->found) : 0;
        if (!own->count) own->count = find(t, end, length, own->found);
        if (own->count) blend(f, own->found, own->count, g->weight[s]);
    }
    float all = 0, kept = 0;
    for (int i = 0; i < f->count; i++) all += f->p[i];
    float rest = all < 1 ? 1 - all : 0; /* of tokens that are not candidates */
    if (g->allowed) {
        const uint8_t *mask = g->allowed(number);
        for (int i = 0; i < f->count; i++) f->p[i] = mask && mask[f->token[i]] ? f->p[i] : 0;
    }
    if (g->sampled) { /* with the noise, the choice is the largest of p e^noise, nearly certain */
        for (int i = 0; i < f->count; i++) f->p[i] *= expf(gumbel(g->seed, g->stream, g->position + node->depth, f->token[i]));
        rest *= 1.4427f; /* the median of e^noise */
    }
    for (int i = 0; i < f->count; i++) kept += f->p[i];
    if (g->allowed || g->sampled)
        for (int i = 0; i < f->count && kept > 0; i++) f->p[i] /= kept + rest;
}

/* What follows a node: by n-grams, and by the learned drafter's tree; `p` is calibrated. */
static void followers(const Growth *g, const Node *node, int32_t number, const int32_t *end, int length, Matches *matches, Followers *f) {
    by_ngrams(g, node, number, end, length, matches, f);
    int count = f->count, beside = 0;
    for (int i = 0; i < count; i++) f->own[i] = f->p[i];
    for (int n = node->learned; node->learned >= 0 && n < g->learned; n++) {
        if (g->learned_parents[n] != node->learned || !(g->learned_p[n] > 0)) continue;
        int before = f->count, at = follower(f, g->learned_tokens[n]);
        if (at < 0) continue;
        if (at == before) f->own[at] = 0;
        f->said[at] = g->learned_p[n], f->learned[at] = n + 1, beside = 1;
    }
    for (int n = node->learned; node->learned >= 0 && n < g->learned; n++) { /* nodes that n-grams gave it */
        if (g->learned_parents[n] != node->learned || g->learned_p[n] > 0) continue;
        for (int i = 0; i < count; i++)
            if (f->token[i] == g->learned_tokens[n]) f->learned[i] = n + 1;
    }
    for (int i = 0; i < f->count; i++) {
        float own = calibrated(beside && !(f->said[i] > 0) ? g->beside : g->table, f->own[i]),
            said = calibrated(g->learned_table, f->said[i]);
        f->p[i] = own > said ? own : said;
        if (f->said[i] > 0) f->own[i] = 0;
        else if (beside) f->own[i] = -f->own[i];
    }
    share(f->p, f->count);
}

/* Grow the tree of the likeliest paths, best first; returns how many nodes it has. No path beats its beginning, so the
 * likeliest paths always form a tree, and no other set of as many nodes is accepted more often. */
EXPORT int specdec_ngram_grow(const Growth *g) {
    Node taken[MOST_NODES + 1], waiting[MOST_NODES + 1];
    int most = g->nodes < MOST_NODES ? g->nodes : MOST_NODES, count = 0, held = 0;
    int32_t text[LONGEST + MOST_NODES];
    Followers f;
    Matches matches[MOST_NODES + 1];
    float worth[MOST_NODES + 1]; /* probability that a node needs to be worth its price, after so many others */
    worth[MOST_NODES] = 0;
    for (int n = MOST_NODES - 1; n >= 0; n--) {
        worth[n] = n + 1 < g->priced ? g->price[n + 1] - g->price[n] : 0;
        if (n + 2 < g->priced && worth[n + 1] < worth[n]) worth[n] = worth[n + 1];
    }
    taken[0] = (Node){1, 0, 0, g->text[g->length - 1], 0, 0, g->learned ? 0 : -1};
    while (count < most) {
        const Node *node = taken + count; /* the newest: offer what follows it */
        if (node->depth < g->limit) {
            memcpy(text, g->text, sizeof *text * g->length);
            for (const Node *n = node; n != taken; n = taken + n->parent) text[g->length + n->depth - 1] = n->token;
            int end = g->length + node->depth, length = end < LONGEST ? end : LONGEST;
            followers(g, node, count, text + end, length, matches, &f);
            for (int i = 0; i < f.count; i++) {
                float value = node->value * (f.p[i] < 1 ? f.p[i] : 1);
                if (!(value > g->least) || (held == most - count && value <= waiting[held - 1].value)) continue;
                int at = held < most - count ? held++ : held - 1;
                for (; at > 0 && value > waiting[at - 1].value; at--) waiting[at] = waiting[at - 1];
                waiting[at] = (Node){value, f.own[i], f.said[i], f.token[i], count, node->depth + 1, f.learned[i]};
            }
        }
        if (!held || waiting[0].value <= worth[count]) break;
        taken[++count] = waiting[0];
        memmove(waiting, waiting + 1, sizeof *waiting * --held);
        g->tokens[count - 1] = taken[count].token, g->parents[count - 1] = taken[count].parent, g->values[count - 1] = taken[count].value;
        g->own_raw[count - 1] = taken[count].own, g->learned_raw[count - 1] = taken[count].said;
        if (held > most - count) held = most - count;
    }
    return count;
}
