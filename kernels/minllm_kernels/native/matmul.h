// Products of small float32 matrices, and what runs them on all threads: the pieces that the native kernels are made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace minllm {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a register
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4)));
typedef float vec_in_memory __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4)));

inline vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_in_memory*>(p) = x; }
inline vec all(float x) { return x - vec{}; }

// e^x for x <= 0, relative error 2e-7: x = n ln 2 + f with |f| <= ln 2 / 2 (ln 2 in two parts, so that f is exact: Cody and Waite),
// the Taylor series of e^f, n into the exponent bits. Below e^-87, -inf included, it is 0.
inline vec exp(vec x) {
  vec n = (x * 1.4426950408889634f + 12582912.0f) - 12582912.0f;  // adding 1.5 x 2^23 rounds to an integer
  vec f = (x - n * 0.693359375f) + n * 2.12194440054690582e-4f;
  vec y = all(1.0f / 5040) * f + 1.0f / 720;
  y = y * f + 1.0f / 120;
  y = y * f + 1.0f / 24;
  y = y * f + 1.0f / 6;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  ivec power = (__builtin_convertvector(x < -87.0f ? vec{} : n, ivec) + 127) << 23;
  return x < -87.0f ? vec{} : y * reinterpret_cast<vec&>(power);
}

inline float sum(vec x) {
  float s = 0;
  for (int i = 0; i < W; i++) s += x[i];
  return s;
}
inline float max(vec x) {
  float m = x[0];
  for (int i = 1; i < W; i++) m = std::max(m, x[i]);
  return m;
}

// R rows by V registers of C (+)= A B, sums kept in registers.
template <int R, int V, bool Add>
inline void tile(int K, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, float* c, int64_t ci) {
  vec s[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) s[r][v] = Add ? load(c + r * ci + v * W) : vec{};
  for (int k = 0; k < K; k++) {
    vec row[V];
    for (int v = 0; v < V; v++) row[v] = load(b + k * bk + v * W);
    for (int r = 0; r < R; r++) {
      float x = a[r * ai + k * ak];
      for (int v = 0; v < V; v++) s[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * ci + v * W, s[r][v]);
}

template <int R, int V, bool Add>
inline void rows(int M, int K, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, float* c, int64_t ci) {
  int i = 0;
  for (; i + R <= M; i += R) tile<R, V, Add>(K, a + i * ai, ai, ak, b, bk, c + i * ci, ci);
  if constexpr (R > 1)
    if (i < M) rows<(R + 1) / 2, V, Add>(M - i, K, a + i * ai, ai, ak, b, bk, c + i * ci, ci);
}

// C [M, N] (+)= A [M, K] B [K, N], N a multiple of W. Element (i, k) of A is a[i ai + k ak]; rows of B and C are bk and ci apart.
template <bool Add>
inline void matmul(int M, int N, int K, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, float* c, int64_t ci) {
  constexpr int wide = W == 16 ? 4 : 2, high = W == 16 ? 6 : 4;  // 24 sums of 32 registers, or 8 of 16
  int n = 0;
  for (; n + wide * W <= N; n += wide * W) rows<high, wide, Add>(M, K, a, ai, ak, b + n, bk, c + n, ci);
  if constexpr (wide == 4)
    for (; n + 2 * W <= N; n += 2 * W) rows<2 * high, 2, Add>(M, K, a, ai, ak, b + n, bk, c + n, ci);
  for (; n < N; n += W) rows<2 * high, 1, Add>(M, K, a, ai, ak, b + n, bk, c + n, ci);
}

// task(0) ... task(count - 1), shared out among the threads as they become free. Returns when all are done.
template <typename Task>
void parallel(xla::ffi::ThreadPool pool, int count, Task task) {
  struct Shared {
    std::atomic<int> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();  // a thread that comes late finds no task left, after this call is over
  auto work = [shared, count, &task] {
    for (int i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      if (shared->done.fetch_add(1) + 1 == count) {
        std::lock_guard lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); i++) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done.load() == count; });
}

}  // namespace minllm
