/* What all kernels share: vectors as wide as the CPU's, and where their threads run. */
#define _GNU_SOURCE /* sched_getcpu */
#include <math.h>
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(_OPENMP) && defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef int16_t vs __attribute__((vector_size(LANES * 2)));

/* The same, and narrower ones, wherever they stand in memory. */
typedef vf vf_at __attribute__((aligned(4), may_alias));
typedef uint8_t vn __attribute__((vector_size(LANES)));
typedef vn vn_at __attribute__((aligned(1), may_alias));
typedef int8_t vb_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE int thread_number(void) {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* A thread that has slept may be woken on the very CPU where the one that waits for it spins, and be left there for
 * tens of milliseconds beside an idle CPU. So the first thread says where it is, and the others leave that place. */
#if defined(_OPENMP) && defined(__linux__)
INLINE int this_cpu(void) { return sched_getcpu(); }

static __attribute__((noinline)) void leave_cpu(int taken) {
    cpu_set_t allowed;
    if (taken < 0 || sched_getaffinity(getpid(), sizeof allowed, &allowed)) return;
    CPU_CLR(taken, &allowed);
    if (CPU_COUNT(&allowed)) sched_setaffinity(0, sizeof allowed, &allowed);
}

INLINE void keep_apart(int first_cpu) {
    if (thread_number() && sched_getcpu() == first_cpu) leave_cpu(first_cpu);
}
#else
INLINE int this_cpu(void) { return -1; }
INLINE void keep_apart(int first_cpu) { (void)first_cpu; }
#endif

INLINE vf load(const float *from) { return *(const vf_at *)from; }
INLINE void store(float *to, vf value) { *(vf_at *)to = value; }

INLINE float sum_lanes(vf value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float sums[LANES];
    store(sums, value);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
#endif
}

/* exp(x) for x <= 0, to about 1e-7 of its value: 2^n times a polynomial (Cephes' expf). */
INLINE vf exp_lanes(vf x) {
    vf low = (vf){0} - 87.0f;
    x = (vf)(((vi)x & (x > low)) | ((vi)low & ~(x > low)));
    vi n = __builtin_convertvector(x * 1.44269504f - 0.5f, vi); /* truncates towards 0, x is negative: rounds */
    vf whole = __builtin_convertvector(n, vf);
    vf r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)((n + 127) << 23);
}
