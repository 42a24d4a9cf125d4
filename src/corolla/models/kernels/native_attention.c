/* Attention over keys and values on pages: of sequences that have one new token each, and of one that has many.
 *
 * Invariant: as in native.c; a row's result does not depend on the rows beside it.
 */
#include "threads.h"
#include "lanes.h"
#include "native.h"

typedef struct {
    int64_t heads, kv_heads;
    int64_t dim, width;           /* of keys and of values: multiples of LANES */
    int64_t page, most;           /* tokens of a page; pages of a row in the table */
    float scale, softcap;         /* softcap: 0 for none */
    int64_t window;               /* newest tokens that are seen; 0 for all */
    const float *sinks, *slopes;  /* [heads], or NULL */
    float *beside;                /* what of each key lies elsewhere, [slots, kv_heads, extra]; NULL for nothing */
    int64_t extra;                /* a multiple of LANES */
} Attention;

/* Weights [length - begin] of one head's scores, in place; returns what they add up to. */
INLINE float weigh(const Attention *a, float *scores, int64_t begin, int64_t length, int64_t head) {
    int64_t count = length - begin;
    float top = a->sinks ? a->sinks[head] : -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        if (a->slopes) scores[i] += a->slopes[head] * (float)(begin + i);
        if (a->softcap) scores[i] = a->softcap * tanhf(scores[i] / a->softcap);
        top = scores[i] > top ? scores[i] : top;
    }
    for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
    vf sums = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vf weights = exp_lanes(load(scores + i) - top);
        store(scores + i, weights);
        sums += weights;
    }
    float total = sum_lanes(sums);
    for (int64_t i = count; i % LANES; i++) total -= scores[i];
    return a->sinks ? total + expf(a->sinks[head] - top) : total;
}

/* Tokens of a row that follow each other in a cache [slots, kv_heads, dim]: `count` of them, `token` floats apart; and
 * where the row goes on. */
typedef struct {
    const float *data, *next;
    int64_t count, token;
} Run;

/* Where a row's token `at` has its numbers, `dim` for each head. */
INLINE const float *place_of(const Attention *a, const float *cache, const int32_t *pages, int64_t at, int64_t kv,
                             int64_t dim) {
    return cache + ((pages[at / a->page] * a->page + at % a->page) * a->kv_heads + kv) * dim;
}

/* Those from token `at` on, up to the end of its page or the row. */
INLINE Run run_from(const Attention *a, const float *cache, const int32_t *pages, int64_t at, int64_t length,
                    int64_t kv, int64_t dim) {
    int64_t left = a->page - at % a->page, more = length - at;
    const float *next = place_of(a, cache, pages, left < more ? at + left : at, kv, dim);
    return (Run){place_of(a, cache, pages, at, kv, dim), next, left < more ? left : more, a->kv_heads * dim};
}

#define AHEAD 6 /* tokens by which memory is asked before it is needed: a head's part of each is a place of its own,
                   which the CPU does not guess */

INLINE void ask_for(const float *numbers, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(numbers + d);
}

INLINE void ask_ahead(Run run, int64_t i, int64_t dim) {
    int64_t at = i + AHEAD;
    ask_for(at < run.count ? run.data + at * run.token : run.next + (at - run.count) * run.token, dim);
}

/* Scores [few][room] of `count` tokens, the first of which goes to `to`; added to what is there, or in its place. */
INLINE void score(const Attention *a, Run keys, const float *query, int64_t head_stride, int64_t few, float *to,
                  int64_t room, const int64_t dim, const int add) {
    for (int64_t i = 0; i < keys.count; i++) {
        const float *key = keys.data + i * keys.token;
        ask_ahead(keys, i, dim);
        for (int64_t g = 0; g < few; g++) {
            const float *own = query + g * head_stride;
            vf sums[2] = {{0}};
            for (int64_t d = 0; d < dim; d += 2 * LANES) {
                sums[0] += load(own + d) * load(key + d);
                if (d + LANES < dim) sums[1] += load(own + d + LANES) * load(key + d + LANES);
            }
            float found = sum_lanes(sums[0] + sums[1]) * a->scale;
            to[g * room + i] = add ? to[g * room + i] + found : found;
        }
    }
}

/* out [few][width] = weights [few][room] times the values of all tokens from `begin` to `length`, of `lanes` * LANES
 * numbers of each from `own` on. Inlined with `lanes` and `few` as constants, sums stay in registers, and values are
 * read once for `few` heads. */
INLINE void mix(const Attention *a, const float *values, const int32_t *pages, int64_t begin, int64_t length,
                int64_t kv, const float *weights, int64_t room, float *out, int64_t own, const int lanes,
                const int few) {
    vf sums[4][4] = {{{0}}};
    for (int64_t at = begin; at < length;) {
        Run run = run_from(a, values, pages, at, length, kv, a->width);
        run.next += own, run.data += own;
        for (int64_t i = 0; i < run.count; i++) {
            const float *value = run.data + i * run.token;
            ask_ahead(run, i, lanes * LANES);
            for (int l = 0; l < lanes; l++)
                for (int g = 0; g < few; g++)
                    sums[g][l] += load(value + l * LANES) * weights[g * room + at - begin + i];
        }
        at += run.count;
    }
    for (int g = 0; g < few; g++)
        for (int l = 0; l < lanes; l++) store(out + g * a->width + own + l * LANES, sums[g][l]);
}

#define HEADS (REGISTERS > 16 ? 4 : 3) /* whose sums, four vectors each, fit into registers */

/* All of out [few][width]. */
INLINE void mix_heads(const Attention *a, const float *values, const int32_t *pages, int64_t begin, int64_t length,
                      int64_t kv, const float *weights, int64_t room, float *out, const int few) {
    int64_t own = 0;
    for (; own + 4 * LANES <= a->width; own += 4 * LANES)
        mix(a, values, pages, begin, length, kv, weights, room, out, own, 4, few);
    for (; own < a->width; own += LANES) mix(a, values, pages, begin, length, kv, weights, room, out, own, 1, few);
}

/* One row's `count` heads from `head` on, which share the keys of `kv`: query [count][dim], out [count][width], scores
 * [count][room]. */
INLINE void attend_group(const Attention *a, const float *keys, const float *values, const int32_t *pages,
                         int64_t length, int64_t kv, int64_t head, int64_t count, const float *query,
                         int64_t head_stride, float *out, float *scores, int64_t room) {
    int64_t dim = a->dim, width = a->width;
    int64_t begin = a->window && length > a->window ? length - a->window : 0;
    for (int64_t at = begin; at < length;) {
        Run run = run_from(a, keys, pages, at, length, kv, dim);
        float *to = scores + at - begin;
        if (dim == 64) score(a, run, query, head_stride, count, to, room, 64, 0);
        else if (dim == 128) score(a, run, query, head_stride, count, to, room, 128, 0);
        else score(a, run, query, head_stride, count, to, room, dim, 0);
        if (a->beside) {
            Run more = run_from(a, a->beside, pages, at, length, kv, a->extra);
            score(a, more, query + dim, head_stride, count, to, room, a->extra, 1);
        }
        at += run.count;
    }
    for (int64_t g = 0; g < count;) {
        float *weights = scores + g * room, *to = out + g * width;
        int64_t few = count - g < HEADS ? count - g : HEADS;
        float totals[HEADS];
        for (int64_t i = 0; i < few; i++) totals[i] = weigh(a, weights + i * room, begin, length, head + g + i);
#define MIX(FEW) mix_heads(a, values, pages, begin, length, kv, weights, room, to, FEW)
        if (few == 1) MIX(1);
        else if (few == 2) MIX(2);
        else if (few == 3) MIX(3);
        else MIX(4);
#undef MIX
        for (int64_t i = 0; i < few; i++)
            for (int64_t d = 0; d < width; d += LANES) store(to + i * width + d, load(to + i * width + d) / totals[i]);
        g += few;
    }
}

/* Tokens [heads, rows, dim] of which only dim lies together. */
typedef struct {
    const float *data;
    int64_t head, row; /* strides */
} Tokens;

/* The last token of a row, whose key or value is new, to its place on the row's pages. */
INLINE void keep(const Attention *a, float *cache, const int32_t *pages, int64_t length, int64_t kv, int64_t dim,
                 Tokens from, int64_t row) {
    int64_t at = length - 1;
    float *to = (float *)place_of(a, cache, pages, at, kv, dim);
    for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(from.data + kv * from.head + row * from.row + d));
}

#define TOGETHER 8 /* heads with the same keys that one thread takes, where there are many */

/* out [rows, heads, width]: each row's query over the `lengths` tokens on its pages, int32 [rows, most] of caches
 * [slots, kv_heads, dim] for keys and [slots, kv_heads, width] for values. New keys and values, if there are any, are
 * put there first. Where `extra` numbers of a key lie in a cache of their own, `beside`, queries are dim + extra wide.
 * `scores` is [threads, heads / kv_heads, room] of scratch, room a multiple of LANES and at least the greatest
 * length. */
void attend_rows(const float *query, int64_t query_head, int64_t query_row, const float *key, int64_t key_head,
                 int64_t key_row, const float *value, int64_t value_head, int64_t value_row, const float *more,
                 int64_t more_head, int64_t more_row, float *keys, float *values, float *beside, const int32_t *pages,
                 const int64_t *lengths, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t width,
                 int64_t extra, int64_t page, int64_t most, float scale, float softcap, int64_t window,
                 const float *sinks, const float *slopes, float *scores, int64_t room, float *out, int threads) {
    Attention a = {heads, kv_heads, dim, width, page, most, scale, softcap, window, sinks, slopes, beside, extra};
    Tokens new_keys = {key, key_head, key_row}, new_values = {value, value_head, value_row};
    Tokens new_beside = {more, more_head, more_row};
    int64_t group = heads / kv_heads, parts = (group + TOGETHER - 1) / TOGETHER;
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        if (key) {
#pragma omp for
            for (int64_t one = 0; one < rows * kv_heads; one++) {
                int64_t row = one / kv_heads, kv = one % kv_heads;
                const int32_t *own = pages + row * most;
                keep(&a, keys, own, lengths[row], kv, dim, new_keys, row);
                if (value) keep(&a, values, own, lengths[row], kv, width, new_values, row);
                if (more) keep(&a, beside, own, lengths[row], kv, extra, new_beside, row);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t one = 0; one < rows * kv_heads * parts; one++) {
            int64_t row = one / parts / kv_heads, kv = one / parts % kv_heads, first = one % parts * TOGETHER;
            int64_t count = group - first < TOGETHER ? group - first : TOGETHER, head = kv * group + first;
            attend_group(&a, keys, values, pages + row * most, lengths[row], kv, head, count,
                         query + row * query_row + head * query_head, query_head, out + (row * heads + head) * width,
                         scores + thread_number() * group * room, room);
        }
    }
}

/* --- many new tokens of one sequence --------------------------------------------------------------------- */

/* A row is one head's query of one token; TILE rows that share keys lie side by side in vectors, so that neither the
 * greatest score nor a sum goes across lanes. Keys are taken BLOCK at a time with what a softmax of those before needs
 * (Dao et al. 2022, arXiv:2205.14135), blocks begin where they do for every row, and what a row does not see changes
 * none of its bits: so they do not depend on how a prompt is cut. */
#define VECTORS 2
#define TILE (VECTORS * LANES)
#define BLOCK 48
#define KEYS (REGISTERS > 16 ? 12 : 6) /* whose scores of a tile fit into registers; a divisor of BLOCK */
#define MIXED (REGISTERS > 16 ? 4 : 2) /* rows whose sums of four vectors do */
#define TILES 2                        /* that one thread takes together, so that a block is read once for them */
#define UNSEEN (-1e30f)

typedef struct {
    float top[TILE], total[TILE], slope[TILE]; /* total: of the weights so far */
    int32_t at[TILE];                          /* the rows' tokens, counted from the sequence's first one */
    int32_t first, last;                       /* of those */
    float *query, *out;                        /* [dim][TILE] and [TILE][width] */
} Tile;

/* weights [BLOCK][TILE]: scores of a block's keys. */
INLINE void score_block(const Tile *tile, const float *const *keys, int64_t dim, float scale, float *weights) {
    for (int first = 0; first < BLOCK; first += KEYS) {
        vf sums[KEYS][VECTORS] = {{{0}}};
        for (int64_t d = 0; d < dim; d++) {
            vf query[VECTORS];
            for (int v = 0; v < VECTORS; v++) query[v] = load(tile->query + d * TILE + v * LANES);
            for (int k = 0; k < KEYS; k++)
                for (int v = 0; v < VECTORS; v++) sums[k][v] += query[v] * keys[first + k][d];
        }
        for (int k = 0; k < KEYS; k++)
            for (int v = 0; v < VECTORS; v++) store(weights + (first + k) * TILE + v * LANES, sums[k][v] * scale);
    }
}

/* Which of LANES rows see token `key`. */
INLINE vi seen_by(const Attention *a, vi rows, int32_t key) {
    vi seen = rows >= key;
    return a->window ? seen & (rows - (int32_t)a->window < key) : seen;
}

/* Scores of a block that begins with token `begin` to weights; gives by what earlier sums are multiplied. */
INLINE void weigh_block(const Attention *a, Tile *tile, int32_t begin, float *weights, float *factors) {
    int whole = begin + BLOCK - 1 <= tile->first && (!a->window || begin > tile->last - a->window);
    for (int v = 0; v < VECTORS; v++) {
        vf before = load(tile->top + v * LANES), top = before, slope = load(tile->slope + v * LANES);
        vi rows = load_whole(tile->at + v * LANES);
        for (int k = 0; k < BLOCK; k++) {
            float *own = weights + k * TILE + v * LANES;
            vf scores = load(own);
            if (a->slopes) scores += slope * (float)(begin + k);
            if (a->softcap)
                for (int i = 0; i < LANES; i++) scores[i] = a->softcap * tanhf(scores[i] / a->softcap);
            if (!whole) {
                vi seen = seen_by(a, rows, begin + k);
                scores = (vf)(((vi)scores & seen) | ((vi)((vf){0} + UNSEEN) & ~seen));
            }
            store(own, scores);
            top = max_lanes(scores, top);
        }
        vf factor = exp_lanes(before - top), total = load(tile->total + v * LANES) * factor;
        for (int k = 0; k < BLOCK; k++) {
            float *own = weights + k * TILE + v * LANES;
            vf weight = exp_lanes(load(own) - top);
            if (!whole) weight = (vf)((vi)weight & seen_by(a, rows, begin + k));
            store(own, weight);
            total += weight;
        }
        store(tile->top + v * LANES, top), store(tile->total + v * LANES, total), store(factors + v * LANES, factor);
    }
}

/* `lanes` vectors of each row's sum, from number `own` on. */
INLINE void mix_some(const Tile *tile, const float *const *values, int64_t width, const float *weights,
                     const float *factors, int64_t own, const int lanes) {
    for (int row = 0; row < TILE; row += MIXED) {
        float *out = tile->out + row * width + own;
        vf sums[MIXED][4];
        for (int r = 0; r < MIXED; r++)
            for (int l = 0; l < lanes; l++) sums[r][l] = load(out + r * width + l * LANES) * factors[row + r];
        for (int k = 0; k < BLOCK; k++) {
            const float *weight = weights + k * TILE + row;
            for (int l = 0; l < lanes; l++) {
                vf value = load(values[k] + own + l * LANES);
                for (int r = 0; r < MIXED; r++) sums[r][l] += value * weight[r];
            }
        }
        for (int r = 0; r < MIXED; r++)
            for (int l = 0; l < lanes; l++) store(out + r * width + l * LANES, sums[r][l]);
    }
}

INLINE void mix_block(const Tile *tile, const float *const *values, int64_t width, const float *weights,
                      const float *factors) {
    int64_t own = 0;
    for (; own + 4 * LANES <= width; own += 4 * LANES) mix_some(tile, values, width, weights, factors, own, 4);
    for (; own < width; own += LANES) mix_some(tile, values, width, weights, factors, own, 1);
}

/* The tile's rows from `row` on, of the `rows` that share the keys of `kv`; those behind them are nobody's. */
INLINE void begin_tile(const Attention *a, Tile *tile, Tokens query, int64_t kv, int64_t row, int64_t rows,
                       int64_t past) {
    int64_t group = a->heads / a->kv_heads;
    memset(tile->out, 0, (size_t)(TILE * a->width) * sizeof(float));
    for (int r = 0; r < TILE; r++) {
        int64_t own = row + r < rows ? row + r : rows - 1, head = kv * group + own % group, token = own / group;
        const float *from = query.data + head * query.head + token * query.row;
        for (int64_t d = 0; d < a->dim; d++) tile->query[d * TILE + r] = from[d];
        tile->at[r] = (int32_t)(past + token);
        tile->top[r] = a->sinks ? a->sinks[head] : UNSEEN;
        tile->total[r] = a->sinks ? 1.0f : 0.0f;
        tile->slope[r] = a->slopes ? a->slopes[head] : 0.0f;
    }
    tile->first = tile->at[0], tile->last = tile->at[TILE - 1];
}

INLINE void end_tile(const Attention *a, const Tile *tile, int64_t kv, int64_t row, int64_t rows, float *out) {
    int64_t group = a->heads / a->kv_heads;
    for (int r = 0; r < TILE && row + r < rows; r++) {
        float *to = out + ((row + r) / group * a->heads + kv * group + (row + r) % group) * a->width;
        for (int64_t d = 0; d < a->width; d += LANES)
            store(to + d, load(tile->out + r * a->width + d) / tile->total[r]);
    }
}

/* TILES tiles from `row` on. */
static void attend_tiles(const Attention *a, const float *keys, const float *values, const int32_t *pages,
                         Tokens query, int64_t kv, int64_t row, int64_t rows, int64_t past, float *out) {
    int count = (int)((rows - row + TILE - 1) / TILE);
    if (count > TILES) count = TILES;
    float weights[BLOCK * TILE] __attribute__((aligned(64))), factors[TILE];
    float queries[count * a->dim * TILE] __attribute__((aligned(64)));
    float outs[count * TILE * a->width] __attribute__((aligned(64)));
    Tile tiles[TILES];
    for (int t = 0; t < count; t++) {
        tiles[t].query = queries + t * a->dim * TILE, tiles[t].out = outs + t * TILE * a->width;
        begin_tile(a, tiles + t, query, kv, row + t * TILE, rows, past);
    }
    int64_t end = tiles[count - 1].last + 1, begin = a->window ? tiles[0].first - a->window + 1 : 0;
    for (int64_t at = begin > 0 ? begin / BLOCK * BLOCK : 0; at < end; at += BLOCK) {
        const float *key[BLOCK], *value[BLOCK];
        for (int64_t k = 0; k < BLOCK; k++) { /* nothing behind the last token is read */
            int64_t token = at + k < end ? at + k : end - 1;
            int64_t later = token + BLOCK < end ? token + BLOCK : token; /* comes while this block is computed */
            key[k] = place_of(a, keys, pages, token, kv, a->dim);
            value[k] = place_of(a, values, pages, token, kv, a->width);
            ask_for(place_of(a, keys, pages, later, kv, a->dim), a->dim);
            ask_for(place_of(a, values, pages, later, kv, a->width), a->width);
        }
        for (int t = 0; t < count; t++) {
            if (at > tiles[t].last) continue;
            score_block(tiles + t, key, a->dim, a->scale, weights);
            weigh_block(a, tiles + t, (int32_t)at, weights, factors);
            mix_block(tiles + t, value, a->width, weights, factors);
        }
    }
    for (int t = 0; t < count; t++) end_tile(a, tiles + t, kv, row + t * TILE, rows, out);
}

/* out [count, heads, width]: `count` queries at the end of the sequence on `pages`, behind `past` tokens of it; all else
 * as in attend_rows, but that new keys and values are in the caches. */
void attend_stretch(const float *query, int64_t query_head, int64_t query_row, const float *keys, const float *values,
                    const int32_t *pages, int64_t past, int64_t count, int64_t heads, int64_t kv_heads, int64_t dim,
                    int64_t width, int64_t page, float scale, float softcap, int64_t window, const float *sinks,
                    const float *slopes, float *out, int threads) {
    Attention a = {heads, kv_heads, dim, width, page, 0, scale, softcap, window, sinks, slopes};
    Tokens queries = {query, query_head, query_row};
    int64_t rows = count * (heads / kv_heads), each = (rows + TILES * TILE - 1) / (TILES * TILE);
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
#pragma omp for schedule(dynamic)
        for (int64_t one = each * kv_heads - 1; one >= 0; one--) /* those that see most first */
            attend_tiles(&a, keys, values, pages, queries, one % kv_heads, one / kv_heads * TILES * TILE, rows, past,
                         out);
    }
}
