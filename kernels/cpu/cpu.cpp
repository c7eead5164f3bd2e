// Optimizer steps in one pass over memory: what the loops of torch.optim do, operator by operator.
//
// Every operation here is one that PyTorch's CPU kernels do for the default form of the class, with
// the same roundings (products that they fuse with the sum after them are `fma` here), so results
// are the same bits. The square root is the caller's, since MKL's is not correctly rounded.
// Nothing of PyTorch is needed to compile this.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Sqrt = void (*)(int64_t count, const float* in, float* out, int64_t mode);
using Half = uint16_t;

constexpr int64_t kMode = 0x2 | 0x140000 | 0x100;  // as PyTorch calls MKL: HA, denormals, no errors
constexpr int64_t kBlock = 256;         // elements that pass by in the first cache
constexpr int64_t kChunk = 256 * kBlock;  // what one thread takes at a time

// Bits of `Rule::flags`.
constexpr int64_t kNesterov = 1, kWritesGradient = 2, kHalfGradient = 4, kCoupled = 8;

}  // namespace

extern "C" {

// One parameter; `largest` (amsgrad) and `copy` (bf16) may be null, the moments of plain SGD, too.
struct Range {
  float* param;
  void* grad;
  float* first;
  float* second;
  float* largest;
  Half* copy;
  int64_t count;
};

// Numbers that are equal for all parameters of a call, rounded to fp32 as PyTorch rounds them.
struct Rule {
  int64_t flags;
  float scale;     // of gradients: the factor that clips them, or 1
  float sign;      // -1 to maximize
  float shrink;    // parameters are multiplied by it: 1 - lr * decay, or 1
  float decay;     // times the parameter is added to the gradient, where coupled
  float weight1;   // Adam: 1 - beta1; SGD: momentum
  float beta2;     // Adam
  float weight2;   // Adam: 1 - beta2; SGD: 1 - dampening
  float bias2;     // Adam: square root of the second moment's correction
  float epsilon;   // Adam
  float step;      // minus the step size
};

// How square roots are taken: by `sqrt`, or correctly rounded where it is null; `estimated` has
// all but subnormal and negative numbers in the way that MKL takes on some processors.
struct Root {
  Sqrt sqrt;
  int64_t estimated;
};
}

namespace {

#define INLINE inline __attribute__((always_inline))

INLINE float widened(Half half) {
  uint32_t bits = uint32_t(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

INLINE float widened(float wide) { return wide; }

INLINE Half rounded(float wide) {
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return Half(wide != wide ? 0xffff : nearest);
}

// Whether a number is subnormal or negative (or -0): no estimate of its root is good.
INLINE uint32_t is_rare(float wide) {
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  return (bits - 1 < 0x7fffff) | (bits >> 31);
}

INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// The gradient as the step takes it; what is clipped is also written back.
template <typename G, bool kWrites>
INLINE float taken(G* grad, int64_t i, const Rule& rule) {
  float g = widened(grad[i]) * rule.scale;
  if constexpr (kWrites) grad[i] = g;
  return g * rule.sign;
}

// Moments of a block; leaves in `root` what the square root is taken of, and returns whether a
// subnormal or negative number is among it.
template <typename G, bool kWrites, bool kLargest>
INLINE bool moments(const Range& r, int64_t at, int64_t count, const Rule& rule, float* root) {
  const float* __restrict__ param = r.param + at;
  G* __restrict__ grad = static_cast<G*>(r.grad) + at;
  float* __restrict__ first = r.first + at;
  float* __restrict__ second = r.second + at;
  float* __restrict__ largest = kLargest ? r.largest + at : nullptr;
  float* __restrict__ out = root;
  const bool decays = rule.flags & kCoupled, small = std::fabs(rule.weight1) < 0.5f;
  uint32_t rare = 0;
  const float weight = small ? rule.weight1 : rule.weight1 - 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    float g = taken<G, kWrites>(grad, i, rule);
    g = decays ? fma_(rule.decay, param[i], g) : g;
    float m = first[i];
    first[i] = fma_(weight, g - m, small ? m : g);
    float v = fma_(rule.weight2 * g, g, second[i] * rule.beta2);
    second[i] = v;
    if constexpr (kLargest) {
      float l = largest[i];
      v = (l > v) | (l != l) ? l : v;
      largest[i] = v;
    }
    out[i] = v;
    rare |= is_rare(v);
  }
  return rare;
}

template <bool kCopies>
INLINE void moved(const Range& r, int64_t at, int64_t count, const Rule& rule, const float* root) {
  float* __restrict__ param = r.param + at;
  const float* __restrict__ first = r.first + at;
  const float* __restrict__ in = root;
  Half* __restrict__ copy = kCopies ? r.copy + at : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    float divisor = in[i] / rule.bias2 + rule.epsilon;
    float p = param[i] * rule.shrink + (rule.step * first[i]) / divisor;
    param[i] = p;
    if constexpr (kCopies) copy[i] = rounded(p);
  }
}

// What MKL computes on processors that are not Intel's: an estimate of 1 / sqrt, refined twice.
#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void estimated_roots(float* root, int64_t count) {
  const __m256 half = _mm256_set1_ps(0.5f), most = _mm256_set1_ps(INFINITY);
  const __m256 zero = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 x = _mm256_load_ps(root + i), r = _mm256_rsqrt_ps(x);
    const __m256 s = _mm256_mul_ps(x, r), h = _mm256_mul_ps(r, half);
    const __m256 e = _mm256_sub_ps(half, _mm256_mul_ps(s, h));
    const __m256 s1 = _mm256_add_ps(_mm256_mul_ps(s, e), s);
    const __m256 h1 = _mm256_add_ps(_mm256_mul_ps(h, e), h);
    const __m256 d = _mm256_sub_ps(x, _mm256_mul_ps(s1, s1));
    const __m256 near = _mm256_add_ps(_mm256_mul_ps(d, h1), s1);
    // 0, infinity and NaN are their own roots.
    const __m256 own = _mm256_or_ps(_mm256_cmp_ps(x, zero, _CMP_EQ_UQ),
                                    _mm256_cmp_ps(x, most, _CMP_EQ_OQ));
    _mm256_store_ps(root + i, _mm256_blendv_ps(near, x, own));
  }
}
#endif

INLINE void roots(float* root, int64_t count, const Root& how, bool rare) {
#if defined(__x86_64__)
  if (how.estimated && !rare) return estimated_roots(root, count);
#endif
  if (how.sqrt != nullptr) return how.sqrt(count, root, root, kMode);
  for (int64_t i = 0; i < count; ++i) root[i] = __builtin_sqrtf(root[i]);
}

template <typename G, bool kWrites>
INLINE void adam(const Range& r, int64_t begin, int64_t end, const Rule& rule, const Root& how) {
  alignas(64) float root[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const bool rare = r.largest != nullptr ? moments<G, kWrites, true>(r, at, count, rule, root)
                                           : moments<G, kWrites, false>(r, at, count, rule, root);
    roots(root, count, how, rare);
    if (r.copy != nullptr) moved<true>(r, at, count, rule, root);
    else moved<false>(r, at, count, rule, root);
  }
}

template <typename G, bool kWrites, bool kMoves, bool kCopies>
INLINE void descended(const Range& r, int64_t begin, int64_t end, const Rule& rule) {
  float* __restrict__ param = r.param;
  G* __restrict__ grad = static_cast<G*>(r.grad);
  float* __restrict__ first = r.first;
  Half* __restrict__ copy = r.copy;
  const bool nesterov = rule.flags & kNesterov, decays = rule.flags & kCoupled;
  for (int64_t i = begin; i < end; ++i) {
    float g = taken<G, kWrites>(grad, i, rule), p = param[i];
    g = decays ? fma_(rule.decay, p, g) : g;
    if constexpr (kMoves) {
      float m = fma_(rule.weight2, g, first[i] * rule.weight1);
      first[i] = m;
      g = nesterov ? fma_(rule.weight1, m, g) : m;
    }
    p = fma_(rule.step, g, p);
    param[i] = p;
    if constexpr (kCopies) copy[i] = rounded(p);
  }
}

template <typename G, bool kWrites>
INLINE void sgd(const Range& r, int64_t begin, int64_t end, const Rule& rule) {
  if (r.first != nullptr) {
    if (r.copy != nullptr) descended<G, kWrites, true, true>(r, begin, end, rule);
    else descended<G, kWrites, true, false>(r, begin, end, rule);
  } else {
    if (r.copy != nullptr) descended<G, kWrites, false, true>(r, begin, end, rule);
    else descended<G, kWrites, false, false>(r, begin, end, rule);
  }
}

template <bool kAdam>
INLINE void part(const Range& r, int64_t begin, int64_t end, const Rule& rule, const Root& how) {
  if (rule.flags & kHalfGradient) {
    if constexpr (kAdam) adam<Half, false>(r, begin, end, rule, how);
    else sgd<Half, false>(r, begin, end, rule);
  } else if (rule.flags & kWritesGradient) {
    if constexpr (kAdam) adam<float, true>(r, begin, end, rule, how);
    else sgd<float, true>(r, begin, end, rule);
  } else {
    if constexpr (kAdam) adam<float, false>(r, begin, end, rule, how);
    else sgd<float, false>(r, begin, end, rule);
  }
}

using Part = void (*)(const Range&, int64_t, int64_t, const Rule&, const Root&);

#define FORMS(suffix, attribute)                                                               \
  attribute void roots_##suffix(float* root, int64_t count, const Root& how, bool rare) {      \
    roots(root, count, how, rare);                                                             \
  }                                                                                            \
  attribute void adam_##suffix(const Range& r, int64_t b, int64_t e, const Rule& u, const Root& s) {  \
    part<true>(r, b, e, u, s);                                                                 \
  }                                                                                            \
  attribute void sgd_##suffix(const Range& r, int64_t b, int64_t e, const Rule& u, const Root& s) {   \
    part<false>(r, b, e, u, s);                                                                \
  }

FORMS(generic, )
#if defined(__x86_64__)
FORMS(avx2, __attribute__((target("avx2,fma"))))
FORMS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#endif

// Take chunks of all ranges, one after the other, until none is left.
void work(const Range* ranges, int64_t count, const Rule& rule, const Root& how, Part part,
          std::atomic<int64_t>* next) {
  int64_t mine = next->fetch_add(1), chunk = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < ranges[i].count; at += kChunk, ++chunk) {
      if (chunk != mine) continue;
      part(ranges[i], at, std::min(at + kChunk, ranges[i].count), rule, how);
      mine = next->fetch_add(1);
    }
  }
}

}  // namespace

extern "C" {

// The best form that this processor has: 0 generic, 1 AVX2, 2 AVX-512.
int harmony_best_form() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Take square roots in place, of at most 256 aligned elements, as `harmony_step` does.
void harmony_roots(float* root, int64_t count, const Root* how, int form) {
  bool rare = false;
  for (int64_t i = 0; i < count; ++i) rare |= is_rare(root[i]);
  if (form == 0) return roots_generic(root, count, *how, rare);
#if defined(__x86_64__)
  if (form == 1) return roots_avx2(root, count, *how, rare);
  roots_avx512(root, count, *how, rare);
#endif
}

// Take a step of Adam (or SGD) for all ranges, on that many threads, the caller's one of them.
void harmony_step(int is_adam, const Range* ranges, int64_t count, const Rule* rule,
                  const Root* how, int form, int num_threads) {
  Part part = is_adam ? adam_generic : sgd_generic;
#if defined(__x86_64__)
  if (form == 1) part = is_adam ? adam_avx2 : sgd_avx2;
  if (form == 2) part = is_adam ? adam_avx512 : sgd_avx512;
#endif
  int64_t num_chunks = 0;
  for (int64_t i = 0; i < count; ++i) num_chunks += (ranges[i].count + kChunk - 1) / kChunk;
  std::atomic<int64_t> next{0};
  auto mine = [&] { work(ranges, count, *rule, *how, part, &next); };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(num_threads, num_chunks); ++i) {
      others.emplace_back(mine);
    }
  } catch (...) {  // the system has no more threads: those that there are do all
  }
  mine();
  for (auto& other : others) other.join();
}
}
