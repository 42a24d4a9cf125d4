/* The kernels that native_program.c calls; each says at its definition what it asks of its arguments. */
#include <stdint.h>

enum { BFLOAT16, FLOAT16, BYTES, NIBBLES, INT8, FLOAT32, FLOAT8 }; /* how a weight is kept */

void narrow_share(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                  int64_t in, int64_t out, const float *bias, const float *x, float *y, int64_t rows);
void narrow_product(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                    int64_t in, int64_t out, const float *bias, const float *x, float *y, int64_t rows, int threads);
void int8_share(const int8_t *values, const float *scales, const int32_t *sums, const float *bias, int64_t in,
                int64_t out, const float *x, uint8_t *codes, float *steps, float *y, int64_t rows, float levels,
                float least);
void int8_product(const int8_t *values, const float *scales, const int32_t *sums, const float *bias, int64_t in,
                  int64_t out, const float *x, uint8_t *codes, float *steps, float *y, int64_t rows, float levels,
                  float least, int threads);
void attend_rows(const float *query, int64_t query_head, int64_t query_row, const float *key, int64_t key_head,
                 int64_t key_row, const float *value, int64_t value_head, int64_t value_row, const float *more,
                 int64_t more_head, int64_t more_row, float *keys, float *values, float *beside, const int32_t *pages,
                 const int64_t *lengths, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t width,
                 int64_t extra, int64_t page, int64_t most, float scale, float softcap, int64_t window,
                 const float *sinks, const float *slopes, float *scores, int64_t room, float *out, int threads);
