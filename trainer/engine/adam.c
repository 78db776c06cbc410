/* AdamW over arrays in RAM in one pass: 26 bytes a parameter of bf16, each of them once.

   update: what one array needs. scale multiplies the gradient. correction1 = 1 - beta1^t,
   correction2 = 1 / sqrt(1 - beta2^t). grad_bits, lp_bits: the types of gradient and copy, 32 for
   float, 16 for bf16, -16 for fp16.
   low: the lower 16 bits of a weight whose upper ones are the bf16 copy, in place of `weight`
   (engine/split_master.py). Both are read and written.
   A thread takes the next piece when it is done with one, so a core that the machine's host lends
   to somebody else for a moment delays nobody. All arrays are one parallel loop: waking a thread
   costs as much as a piece.
   Compiled without fused multiply-add: a vector and its remainder, and any two machines, then give
   the same bits. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { PIECE = 1 << 16 }; /* elements: 1.8 MB, what a core's cache holds */

typedef struct {
    float *weight;
    uint16_t *low;
    float *exp_avg, *exp_avg_sq;
    const void *grad;
    void *param_lp; /* the low-precision copy, or NULL; of grad's type where that has 16 bits */
    int64_t size, left; /* elements; those not updated yet */
    float scale, lr, beta1, beta2, eps, decay, correction1, correction2;
    int grad_bits, lp_bits;
} update;

static inline float load_float(float x) { return x; }
static inline float store_float(float x) { return x; }

static inline float load_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t store_bf16(float x) /* to the nearest, ties to even, as torch does it */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline float join(uint16_t high, uint16_t low) /* low is negative where high was rounded up */
{
    uint32_t bits = ((uint32_t)high << 16) + (uint32_t)(int16_t)low;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float x) /* one NaN only, so that rounding does not make it a zero */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc00000 : bits;
}

#if defined(__x86_64__) && !defined(__clang__)
#define VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VERSIONS
#endif

#define FROM_WEIGHT weight[i]
#define TO_WEIGHT(w, store) (weight[i] = w, param_lp ? (void)(param_lp[i] = store(w)) : (void)0)
#define FROM_HALVES join(param_lp[i], low[i])
#define TO_HALVES(w, store) (low[i] = bits_of(w), param_lp[i] = (bits_of(w) + 0x8000) >> 16)

#define KERNEL(name, type, load, lp_type, store, FROM, TO)                                          \
    VERSIONS static void name(const update *u, int64_t from, int64_t to)                            \
    {                                                                                               \
        float *restrict weight = u->weight;                                                         \
        uint16_t *restrict low = u->low;                                                            \
        float *restrict exp_avg = u->exp_avg, *restrict exp_avg_sq = u->exp_avg_sq;                 \
        const type *restrict grad = u->grad;                                                        \
        lp_type *restrict param_lp = u->param_lp;                                                   \
        const float scale = u->scale, beta1 = u->beta1, beta2 = u->beta2, eps = u->eps;             \
        const float step = u->lr / u->correction1, correction2 = u->correction2;                    \
        const float kept = 1 - u->lr * u->decay;                                                    \
        for (int64_t i = from; i < to; i++) {                                                       \
            const float g = load(grad[i]) * scale;                                                  \
            const float m = beta1 * exp_avg[i] + (1 - beta1) * g;                                   \
            const float v = beta2 * exp_avg_sq[i] + (1 - beta2) * g * g;                            \
            const float w = FROM * kept - step * (m / (sqrtf(v) * correction2 + eps));              \
            exp_avg[i] = m;                                                                         \
            exp_avg_sq[i] = v;                                                                      \
            TO(w, store);                                                                           \
        }                                                                                           \
    }

KERNEL(run_float, float, load_float, float, store_float, FROM_WEIGHT, TO_WEIGHT)
KERNEL(run_float_bf16, float, load_float, uint16_t, store_bf16, FROM_WEIGHT, TO_WEIGHT)
KERNEL(run_bf16, uint16_t, load_bf16, uint16_t, store_bf16, FROM_WEIGHT, TO_WEIGHT)
KERNEL(run_float_halves, float, load_float, uint16_t, store_bf16, FROM_HALVES, TO_HALVES)
KERNEL(run_bf16_halves, uint16_t, load_bf16, uint16_t, store_bf16, FROM_HALVES, TO_HALVES)
#ifdef __FLT16_MAX__
#define load_fp16(x) ((float)(x))
#define store_fp16(x) ((_Float16)(x))
KERNEL(run_float_fp16, float, load_float, _Float16, store_fp16, FROM_WEIGHT, TO_WEIGHT)
KERNEL(run_fp16, _Float16, load_fp16, _Float16, store_fp16, FROM_WEIGHT, TO_WEIGHT)
int adam_knows_fp16(void) { return 1; }
#else
#define run_float_fp16 run_float_bf16
#define run_fp16 run_bf16
int adam_knows_fp16(void) { return 0; }
#endif

static void run(const update *u, int64_t from, int64_t to)
{
    if (u->low && u->grad_bits == 16) run_bf16_halves(u, from, to);
    else if (u->low) run_float_halves(u, from, to);
    else if (u->grad_bits == 16) run_bf16(u, from, to);
    else if (u->grad_bits == -16) run_fp16(u, from, to);
    else if (u->lp_bits == 16) run_float_bf16(u, from, to);
    else if (u->lp_bits == -16) run_float_fp16(u, from, to);
    else run_float(u, from, to);
}

void adam_step(update *updates, int64_t count, int threads)
{
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; i++) pieces += (updates[i].size + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(monotonic : dynamic, 1)
    for (int64_t k = 0; k < pieces; k++) {
        update *u = updates;
        int64_t at = k;
        for (; at >= (u->size + PIECE - 1) / PIECE; u++) at -= (u->size + PIECE - 1) / PIECE;
        const int64_t from = at * PIECE, to = from + PIECE < u->size ? from + PIECE : u->size;
        run(u, from, to);
        __atomic_fetch_sub(&u->left, to - from, __ATOMIC_RELEASE);
    }
}

void adam_wait(const update *u)
{
    const struct timespec moment = {0, 50000};
    while (__atomic_load_n(&u->left, __ATOMIC_ACQUIRE)) nanosleep(&moment, NULL);
}
