// The loop of `scan.selective_scan` (paper equations 5-8) in one pass over the positions, for rows of contiguous tensors.
// A block of WIDTH channels is taken at a time, so that its states stay in the first cache from one position to the next.
// Plain C++17: what `compiled_scan.py` compiles and what it calls are the four functions at the end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t WIDTH = 64;

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

double power_of_two(double v) { return std::exp2(v); }

// 2^v = 2^k 2^r with |r| <= 1/2 and a polynomial of 2^r (coefficients of Cephes), to 2e-7; without a branch, so that the
// loops around it vectorise.
inline float power_of_two(float v) {
  v = v < -126.0f ? -126.0f : v;
  v = v > 128.0f ? 128.0f : v;
  const float k = std::nearbyintf(v), r = v - k;
  float p = 1.535336188319500e-4f;
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Channels first .. first + WIDTH of [E, N], as [N, WIDTH], times a factor; what is past the end is 0.
template <typename T>
void gather(const T* from, T* to, int64_t first, int64_t E, int64_t N, T factor = T(1)) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t e = 0; e < WIDTH; ++e) to[n * WIDTH + e] = first + e < E ? factor * from[(first + e) * N + n] : T(0);
}

template <typename T>
void scatter(const T* from, T* to, int64_t first, int64_t E, int64_t N) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t e = 0; e < WIDTH && first + e < E; ++e) to[(first + e) * N + n] = from[n * WIDTH + e];
}

template <typename T>
void load(const T* from, T* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
  std::memset(to + n, 0, (WIDTH - n) * sizeof(T));
}

// x, delta, y: [rows, L, E]; A: [E, N]; B, C: [rows, L, N]; start, last: [rows, E, N].
template <typename T>
void forward(const T* x, const T* delta, const T* A, const T* B, const T* C, const T* start, T* y, T* last, int64_t rows,
             int64_t L, int64_t E, int64_t N) {
  std::vector<T> a(N * WIDTH), h(N * WIDTH);
  T d[WIDTH], dx[WIDTH], sum[WIDTH];
  for (int64_t first = 0; first < E; first += WIDTH) {
    const int64_t here = E - first < WIDTH ? E - first : WIDTH;
    gather(A, a.data(), first, E, N, T(LOG2_E));
    for (int64_t row = 0; row < rows; ++row) {
      gather(start + row * E * N, h.data(), first, E, N);
      for (int64_t t = 0; t < L; ++t) {
        const int64_t at = row * L + t;
        load(delta + at * E + first, d, here);
        load(x + at * E + first, dx, here);
        for (int64_t e = 0; e < WIDTH; ++e) dx[e] *= d[e], sum[e] = T(0);
        for (int64_t n = 0; n < N; ++n) {
          const T b = B[at * N + n], c = C[at * N + n];
          const T* a_n = a.data() + n * WIDTH;
          T* h_n = h.data() + n * WIDTH;
#pragma omp simd
          for (int64_t e = 0; e < WIDTH; ++e) {
            h_n[e] = h_n[e] * power_of_two(d[e] * a_n[e]) + dx[e] * b;
            sum[e] += c * h_n[e];
          }
        }
        std::memcpy(y + at * E + first, sum, here * sizeof(T));
      }
      scatter(h.data(), last + row * E * N, first, E, N);
    }
  }
}

// The gradients of what `forward` takes, of those at y and at the last state. grad_B and grad_C come in as zeros; grad_A
// too, or null where nobody asks for it. The states are computed anew, a block of channels at a time.
template <typename T>
void backward(const T* x, const T* delta, const T* A, const T* B, const T* C, const T* start, const T* grad_y,
              const T* grad_last, T* grad_x, T* grad_delta, T* grad_A, T* grad_B, T* grad_C, T* grad_start, int64_t rows,
              int64_t L, int64_t E, int64_t N) {
  const int64_t size = N * WIDTH;
  std::vector<T> a(size), g(size), ga(size), states((L + 1) * size), decays(L * size);
  T d[WIDTH], x_[WIDTH], dx[WIDTH], gy[WIDTH], gdx[WIDTH], gd[WIDTH];
  for (int64_t first = 0; first < E; first += WIDTH) {
    const int64_t here = E - first < WIDTH ? E - first : WIDTH;
    gather(A, a.data(), first, E, N, T(LOG2_E));
    std::fill(ga.begin(), ga.end(), T(0));
    for (int64_t row = 0; row < rows; ++row) {
      gather(start + row * E * N, states.data(), first, E, N);
      for (int64_t t = 0; t < L; ++t) {
        const int64_t at = row * L + t;
        load(delta + at * E + first, d, here);
        load(x + at * E + first, dx, here);
        for (int64_t e = 0; e < WIDTH; ++e) dx[e] *= d[e];
        for (int64_t n = 0; n < N; ++n) {
          const T b = B[at * N + n];
          const T* a_n = a.data() + n * WIDTH;
          const T* before = states.data() + t * size + n * WIDTH;
          T* after = states.data() + (t + 1) * size + n * WIDTH;
          T* decay = decays.data() + t * size + n * WIDTH;
#pragma omp simd
          for (int64_t e = 0; e < WIDTH; ++e) {
            decay[e] = power_of_two(d[e] * a_n[e]);
            after[e] = before[e] * decay[e] + dx[e] * b;
          }
        }
      }
      gather(grad_last + row * E * N, g.data(), first, E, N);
      for (int64_t t = L - 1; t >= 0; --t) {
        const int64_t at = row * L + t;
        load(delta + at * E + first, d, here);
        load(x + at * E + first, x_, here);
        load(grad_y + at * E + first, gy, here);
        for (int64_t e = 0; e < WIDTH; ++e) dx[e] = x_[e] * d[e], gdx[e] = gd[e] = T(0);
        for (int64_t n = 0; n < N; ++n) {
          const T b = B[at * N + n], c = C[at * N + n];
          const T* a_n = a.data() + n * WIDTH;
          const T* before = states.data() + t * size + n * WIDTH;
          const T* after = before + size;
          const T* decay = decays.data() + t * size + n * WIDTH;
          T* g_n = g.data() + n * WIDTH;
          T* ga_n = ga.data() + n * WIDTH;
          T at_b = T(0), at_c = T(0);
#pragma omp simd reduction(+ : at_b, at_c)
          for (int64_t e = 0; e < WIDTH; ++e) {
            at_c += gy[e] * after[e];
            const T g_e = g_n[e] + gy[e] * c;
            gdx[e] += g_e * b;
            at_b += g_e * dx[e];
            g_n[e] = g_e * decay[e];  // now the gradient of the state before and, times it, of the exponent delta A
            const T exponent = g_n[e] * before[e];
            gd[e] += exponent * a_n[e];
            ga_n[e] += exponent * d[e];
          }
          grad_B[at * N + n] += at_b;
          grad_C[at * N + n] += at_c;
        }
        for (int64_t e = 0; e < here; ++e) {
          grad_x[at * E + first + e] = gdx[e] * d[e];
          grad_delta[at * E + first + e] = T(LN_2) * gd[e] + gdx[e] * x_[e];
        }
      }
      scatter(g.data(), grad_start + row * E * N, first, E, N);
    }
    if (grad_A != nullptr) scatter(ga.data(), grad_A, first, E, N);
  }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                            \
  void forward_##NAME(const T* x, const T* delta, const T* A, const T* B, const T* C, const T* start, T* y, T* last,  \
                      int64_t rows, int64_t L, int64_t E, int64_t N) {                                                \
    forward<T>(x, delta, A, B, C, start, y, last, rows, L, E, N);                                                     \
  }                                                                                                                   \
  void backward_##NAME(const T* x, const T* delta, const T* A, const T* B, const T* C, const T* start,                \
                       const T* grad_y, const T* grad_last, T* grad_x, T* grad_delta, T* grad_A, T* grad_B,           \
                       T* grad_C, T* grad_start, int64_t rows, int64_t L, int64_t E, int64_t N) {                     \
    backward<T>(x, delta, A, B, C, start, grad_y, grad_last, grad_x, grad_delta, grad_A, grad_B, grad_C, grad_start,  \
                rows, L, E, N);                                                                                       \
  }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
}
