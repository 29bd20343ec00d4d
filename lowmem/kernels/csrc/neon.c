/* The ISA neon, 64-bit ARM, four lanes. The sixteen levels are four registers, and a byte-table lookup finds their bytes. */
#include "kernel.h"
#if HAS_NEON
#include <arm_neon.h>

#define LANES 4
typedef float32x4_t V;
typedef uint32x4_t W;
typedef uint8x16x4_t T;

#define v_set1 vdupq_n_f32
#define v_keep(a) __asm__("" : "+w"(a))
#define v_fma(a, b, sum) vfmaq_f32(sum, a, b)

/* Indices of the four bytes of float32 number i in a table of them. */
static inline uint8x16_t bytes_at(W i)
{
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), i, vdupq_n_u32(0x04040404)));
}
static inline T table_load(const float *levels) { return vld1q_u8_x4((const uint8_t *)levels); }
static inline __attribute__((always_inline)) V v_lookup(T table, W words, const int k)
{
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, bytes_at(words >> (4 * k) & vdupq_n_u32(15))));
}
static inline V v_spread(V a, const int32_t *index)
{
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a), bytes_at(vld1q_u32((const uint32_t *)index))));
}

static inline V v_sums(V *v) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
static inline void v_transpose(V *v)
{
#define PAIRS(which, a, b) vreinterpretq_f64_f32(vtrn##which##q_f32(a, b))
    const float64x2_t even = PAIRS(1, v[0], v[1]), odd = PAIRS(2, v[0], v[1]);
    const float64x2_t next_even = PAIRS(1, v[2], v[3]), next_odd = PAIRS(2, v[2], v[3]);
#undef PAIRS
    v[0] = vreinterpretq_f32_f64(vtrn1q_f64(even, next_even));
    v[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd, next_odd));
    v[2] = vreinterpretq_f32_f64(vtrn2q_f64(even, next_even));
    v[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd, next_odd));
}

static inline W bytes_load(const uint8_t *p)
{
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
}
#define one_half half_to_float
#define v_half(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define v_bfloat(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
static inline void v_to_half(uint16_t *p, V a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }

/* v_code is a binary search: the bits of a code that are found select the boundary for the next bit. */
typedef struct {
    V bit3, bit2[2];
    uint8x16_t bit1; /* looked up with the bits found so far */
    uint8x16x2_t bit0;
} B;
static inline B boundaries_load(const float *p)
{
    const float bit1[4] = {p[1], p[5], p[9], p[13]}, bit0[8] = {p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]};
    return (B){
        v_set1(p[7]), {v_set1(p[3]), v_set1(p[11])}, vld1q_u8((const uint8_t *)bit1), vld1q_u8_x2((const uint8_t *)bit0),
    };
}
static inline W v_code(B b, V a)
{
    /* a comparison that is true is all ones, or -1 */
    const W bit3 = vcgtq_f32(a, b.bit3), bit2 = vcgtq_f32(a, vbslq_f32(bit3, b.bit2[1], b.bit2[0]));
    W code = (vdupq_n_u32(0) - bit3 - bit3) - bit2;
    code = code + code - vcgtq_f32(a, vreinterpretq_f32_u8(vqtbl1q_u8(b.bit1, bytes_at(code))));
    return code + code - vcgtq_f32(a, vreinterpretq_f32_u8(vqtbl2q_u8(b.bit0, bytes_at(code))));
}
static inline void codes_store(uint8_t *p, W codes)
{
    const uint16x4_t halves = vmovn_u32(codes);
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))), 0);
    memcpy(p, &four, sizeof four);
}

#define FUSED_BATCH 8
#define FUSED_INPUTS 8
#define MANY_VECTORS 2
#define MANY_INPUTS 12
#define FEW_ROWS(M) 2
#define TILE_VECTORS 4
#define GRAD_SIXTEEN 16

/* Products in 8-bit integers (inputs8.h): sdot where the compiler may use it (ARMv8.2, and all of Apple's), else in 16 bits, where a
 * sum of two products is at most 2 * 128 * 127. */
#define INPUTS8_SHIFTED 0
#define INPUTS8_SHIFTS_CODES 0
#define IS_SHIFTED(w) 0
#define QUADS(is_shifted) 2
#define INPUTS8_INPUTS 8
struct steps {
    W bytes;
};
static inline W steps_load(const uint8_t *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
static inline W steps_lookup(W table, W index)
{
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(table), vreinterpretq_u8_u32(index)));
}
static inline struct steps steps_of(W bytes, const int is_shifted) { return (struct steps){bytes}; }
static inline __attribute__((always_inline)) W add_products(W sum, const struct steps *w, const W *x, const int n, const int is_shifted)
{
    int32x4_t sums = vreinterpretq_s32_u32(sum);
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
        const int8x16_t a = vreinterpretq_s8_u32(w[k].bytes), b = vreinterpretq_s8_u32(x[k]);
#if defined(__ARM_FEATURE_DOTPROD)
        sums = vdotq_s32(sums, a, b);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
        sums = vpadalq_s16(sums, vpaddq_s16(low, high));
#endif
    }
    return vreinterpretq_u32_s32(sums);
}

#include "floats.h"

const struct isa isa_neon = FLOAT_ISA("neon");
#endif
