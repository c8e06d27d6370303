// Attention on a CPU in float32, forward and backward: one task per row of the batch and key/value head, 64 queries at a time, their scores
// in the second-level cache (Dao et al. 2022, arXiv 2205.14135, with the keys of a row as one outer block).
//
// q [B, T, N, H], k [B, S, K, H], v [B, S, K, h], lse [B, K, N / K, T]; see [B, T, S] says which query sees which key, and
// blocks [B, T / 64, S / 64] whether a block of it holds no (0), some (1) or only (2) ones. Blocks without any are not computed.
#include <cmath>
#include <limits>

#include "matmul.h"

namespace ffi = xla::ffi;
using namespace minllm;
using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;

constexpr int C = 64;  // queries, and keys, of a block
constexpr float INF = std::numeric_limits<float>::infinity();

struct Shape {
  int64_t B, T, S, N, K, H, h, G, Tb, Sb;
  Shape(Floats& q, Floats& k, Floats& v)
      : B(q.dimensions()[0]), T(q.dimensions()[1]), S(k.dimensions()[1]), N(q.dimensions()[2]), K(k.dimensions()[2]),
        H(q.dimensions()[3]), h(v.dimensions()[3]), G(N / K), Tb((T + C - 1) / C), Sb((S + C - 1) / C) {}
};

// x [S, width], rows `stride` apart, as [width, Sb C]: columns behind S are zero.
static void transpose(const float* x, int64_t stride, int64_t S, int64_t width, int64_t columns, float* out) {
  for (int64_t s0 = 0; s0 < S; s0 += 16)
    for (int64_t i = 0; i < width; i++)
      for (int64_t s = s0; s < std::min(S, s0 + 16); s++) out[i * columns + s] = x[s * stride + i];
  for (int64_t i = 0; i < width; i++) std::fill(out + i * columns + S, out + (i + 1) * columns, 0.0f);
}

// x [S, width], rows `stride` apart, as [Sb C, width] with zeros behind S.
static void copy(const float* x, int64_t stride, int64_t S, int64_t width, int64_t count, float factor, float* out) {
  for (int64_t s = 0; s < S; s++)
    for (int64_t i = 0; i < width; i++) out[s * width + i] = x[s * stride + i] * factor;
  std::fill(out + S * width, out + count * width, 0.0f);
}

// Scores of a block that may not be seen become -inf; so do columns behind S.
static void hide(float* s, int64_t ld, const uint8_t* see, int64_t S, int64_t queries, int64_t keys) {
  for (int64_t i = 0; i < queries; i++) {
    for (int64_t j = 0; j < keys; j++) s[i * ld + j] = see[i * S + j] ? s[i * ld + j] : -INF;
    std::fill(s + i * ld + keys, s + i * ld + C, -INF);
  }
}

static ffi::Error Forward(ffi::ThreadPool pool, float scale, Floats q, Floats k, Floats v, Floats sinks, Bytes see, Bytes blocks,
                          ffi::Result<Floats> o, ffi::Result<Floats> lse) {
  const Shape n(q, k, v);
  const int64_t keys = n.Sb * C;
  const bool sink = sinks.element_count() > 0;
  parallel(pool, n.B * n.K, [&](int task) {
    const int64_t b = task / n.K, kv = task % n.K;
    std::vector<float> kt(n.H * keys), vs(keys * n.h), qs(C * n.H), s(C * keys), y(C * n.h);
    transpose(k.typed_data() + (b * n.S * n.K + kv) * n.H, n.K * n.H, n.S, n.H, keys, kt.data());
    copy(v.typed_data() + (b * n.S * n.K + kv) * n.h, n.K * n.h, n.S, n.h, keys, 1.0f, vs.data());
    for (int64_t g = 0; g < n.G; g++)
      for (int64_t t0 = 0; t0 < n.T; t0 += C) {
        const int64_t head = kv * n.G + g, queries = std::min<int64_t>(C, n.T - t0);
        const uint8_t* block = blocks.typed_data() + (b * n.Tb + t0 / C) * n.Sb;
        copy(q.typed_data() + ((b * n.T + t0) * n.N + head) * n.H, n.N * n.H, queries, n.H, queries, scale, qs.data());
        for (int64_t j = 0; j < n.Sb; j++) {
          if (!block[j]) continue;
          matmul<false>(queries, C, n.H, qs.data(), n.H, 1, kt.data() + j * C, keys, s.data() + j * C, keys);
          if (block[j] == 1)
            hide(s.data() + j * C, keys, see.typed_data() + (b * n.T + t0) * n.S + j * C, n.S, queries, std::min<int64_t>(C, n.S - j * C));
        }
        std::fill(y.begin(), y.end(), 0.0f);
        float total[C];
        for (int64_t i = 0; i < queries; i++) {
          float* row = s.data() + i * keys;
          vec top = all(sink ? sinks.typed_data()[head] : -INF);
          for (int64_t j = 0; j < n.Sb; j++)
            if (block[j])
              for (int c = 0; c < C; c += W) {
                vec x = load(row + j * C + c);
                top = x > top ? x : top;
              }
          float m = max(top);
          if (m == -INF) m = 0;
          vec sums{};
          for (int64_t j = 0; j < n.Sb; j++)
            if (block[j])
              for (int c = 0; c < C; c += W) {
                vec p = exp(load(row + j * C + c) - m);
                store(row + j * C + c, p);
                sums += p;
              }
          total[i] = sum(sums) + (sink ? std::exp(sinks.typed_data()[head] - m) : 0.0f);
          lse->typed_data()[((b * n.K + kv) * n.G + g) * n.T + t0 + i] = total[i] > 0 ? m + std::log(total[i]) : INF;
        }
        for (int64_t j = 0; j < n.Sb; j++)
          if (block[j]) matmul<true>(queries, n.h, C, s.data() + j * C, keys, 1, vs.data() + j * C * n.h, n.h, y.data(), n.h);
        for (int64_t i = 0; i < queries; i++) {
          float* out = o->typed_data() + ((b * n.T + t0 + i) * n.N + head) * n.h;
          const float by = total[i] > 0 ? 1 / total[i] : 0;
          for (int64_t c = 0; c < n.h; c++) out[c] = y[i * n.h + c] * by;
        }
      }
  });
  return ffi::Error::Success();
}

// With p = exp(s - lse): dv = p^T do, dp = do v^T, ds = p (dp - delta), dq = ds k scale, dk = ds^T q scale; delta = sum(do o) per query.
static ffi::Error Backward(ffi::ThreadPool pool, float scale, Floats q, Floats k, Floats v, Bytes see, Bytes blocks, Floats lse,
                           Floats delta, Floats d_o, ffi::Result<Floats> dq, ffi::Result<Floats> dk, ffi::Result<Floats> dv) {
  const Shape n(q, k, v);
  const int64_t keys = n.Sb * C;
  parallel(pool, n.B * n.K, [&](int task) {
    const int64_t b = task / n.K, kv = task % n.K;
    std::vector<float> kt(n.H * keys), vt(n.h * keys), ks(keys * n.H), qs(C * n.H), dos(C * n.h), p(C * C), ds(C * C), dqs(C * n.H);
    std::vector<float> dks(keys * n.H), dvs(keys * n.h);
    const float* k0 = k.typed_data() + (b * n.S * n.K + kv) * n.H;
    transpose(k0, n.K * n.H, n.S, n.H, keys, kt.data());
    copy(k0, n.K * n.H, n.S, n.H, keys, 1.0f, ks.data());
    transpose(v.typed_data() + (b * n.S * n.K + kv) * n.h, n.K * n.h, n.S, n.h, keys, vt.data());
    for (int64_t g = 0; g < n.G; g++)
      for (int64_t t0 = 0; t0 < n.T; t0 += C) {
        const int64_t head = kv * n.G + g, queries = std::min<int64_t>(C, n.T - t0), at = ((b * n.K + kv) * n.G + g) * n.T + t0;
        const uint8_t* block = blocks.typed_data() + (b * n.Tb + t0 / C) * n.Sb;
        copy(q.typed_data() + ((b * n.T + t0) * n.N + head) * n.H, n.N * n.H, queries, n.H, queries, scale, qs.data());
        copy(d_o.typed_data() + ((b * n.T + t0) * n.N + head) * n.h, n.N * n.h, queries, n.h, queries, 1.0f, dos.data());
        std::fill(dqs.begin(), dqs.end(), 0.0f);
        for (int64_t j = 0; j < n.Sb; j++) {
          if (!block[j]) continue;
          matmul<false>(queries, C, n.H, qs.data(), n.H, 1, kt.data() + j * C, keys, p.data(), C);
          if (block[j] == 1)
            hide(p.data(), C, see.typed_data() + (b * n.T + t0) * n.S + j * C, n.S, queries, std::min<int64_t>(C, n.S - j * C));
          matmul<false>(queries, C, n.h, dos.data(), n.h, 1, vt.data() + j * C, keys, ds.data(), C);
          for (int64_t i = 0; i < queries; i++) {
            const float l = lse.typed_data()[at + i], d = delta.typed_data()[at + i];
            for (int c = 0; c < C; c += W) {
              vec x = exp(load(p.data() + i * C + c) - l);
              store(p.data() + i * C + c, x);
              store(ds.data() + i * C + c, x * (load(ds.data() + i * C + c) - d));
            }
          }
          matmul<true>(queries, n.H, C, ds.data(), C, 1, ks.data() + j * C * n.H, n.H, dqs.data(), n.H);
          matmul<true>(C, n.H, queries, ds.data(), 1, C, qs.data(), n.H, dks.data() + j * C * n.H, n.H);
          matmul<true>(C, n.h, queries, p.data(), 1, C, dos.data(), n.h, dvs.data() + j * C * n.h, n.h);
        }
        for (int64_t i = 0; i < queries; i++)
          for (int64_t c = 0; c < n.H; c++) dq->typed_data()[((b * n.T + t0 + i) * n.N + head) * n.H + c] = dqs[i * n.H + c] * scale;
      }
    for (int64_t s = 0; s < n.S; s++) {
      for (int64_t c = 0; c < n.H; c++) dk->typed_data()[((b * n.S + s) * n.K + kv) * n.H + c] = dks[s * n.H + c];
      for (int64_t c = 0; c < n.h; c++) dv->typed_data()[((b * n.S + s) * n.K + kv) * n.h + c] = dvs[s * n.h + c];
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(minllm_attention_forward, Forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Arg<Bytes>().Arg<Bytes>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(minllm_attention_backward, Backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Bytes>().Arg<Bytes>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>()
                                  .Ret<Floats>());
