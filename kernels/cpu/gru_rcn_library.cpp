// The input convolution runs once over all frames, and in backward its gradients and those of the recurrent weights; a step is two
// convolutions and two passes over its elements. Frames are channels first, as the library reads them; steps follow one another
// in scratch, so that each is one dense tensor. The activations are kept as the other form keeps them, channels last.

#include "gru_rcn_library.h"

#include <cmath>
#include <cstdlib>
#include <string>

#include "buffer.h"

namespace convrnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor reshape(const Tensor& x, const Shape& sizes) {
  return call("aten::reshape", x, sizes);
}

Shape paddings(const Tensor& weight) {
  Shape sizes;
  for (int64_t d = 2; d < weight.dim(); ++d) {
    sizes.push_back(weight.size(d) / 2);
  }
  return sizes;
}

// The taps of an odd kernel that meet a frame of x's size anywhere; with the others the library's convolutions of frames are wrong in
// places (bfloat16, 5x5 on 1x1).
Tensor reaching(Tensor weight, const Tensor& x) {
  for (int64_t d = 2, from_end = weight.dim() - 2; d < weight.dim(); ++d, --from_end) {
    const int64_t half = weight.size(d) / 2, reach = std::min(half, x.size(x.dim() - from_end) - 1);
    if (reach < half) {
      weight = call("aten::narrow", weight, d, half - reach, 2 * reach + 1);
    }
  }
  return torch::stable::contiguous(weight);
}

// The gradient of a weight from that of its taps that meet the frame.
Tensor whole_gradient(const Tensor& of_reaching, const Tensor& weight) {
  if (shape(of_reaching) == shape(weight)) {
    return dense(of_reaching);
  }
  Tensor whole = empty(weight, shape(weight)), inside = whole;
  torch::stable::zero_(whole);
  for (int64_t d = 2; d < weight.dim(); ++d) {
    inside = call("aten::narrow", inside, d, (weight.size(d) - of_reaching.size(d)) / 2, of_reaching.size(d));
  }
  torch::stable::copy_(inside, of_reaching);
  return whole;
}

// x (N, channels, *S) with an odd kernel.
Tensor convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  const Shape padding = paddings(weight), ones(padding.size(), 1), zeros(padding.size(), 0);
  return torch::stable::contiguous(call("aten::convolution", x, weight, bias, ones, padding, ones, false, zeros, int64_t{1}));
}

// Gradients of x, the weight and the bias, of which `wanted` says which.
std::array<Tensor, 3> convolve_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                        const std::array<bool, 3>& wanted) {
  using torch::stable::detail::from;
  const Shape padding = paddings(weight), ones(padding.size(), 1), zeros(padding.size(), 0);
  const std::optional<Shape> bias(Shape{weight.size(0)});
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(wanted.data(), wanted.size());
  std::array<StableIValue, 11> stack{from(gradient), from(x),     from(weight), from(bias),       from(ones), from(padding),
                                     from(ones),     from(false), from(zeros),  from(int64_t{1}), from(mask)};
  call_dispatcher("aten::convolution_backward", stack);
  std::array<Tensor, 3> found{Tensor(), Tensor(), Tensor()};
  for (size_t i = 0; i < found.size(); ++i) {
    found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return found;
}

Tensor data_gradient(const Tensor& gradient, const Tensor& x, const Tensor& weight) {
  return torch::stable::contiguous(convolve_backward(gradient, x, weight, {true, false, false})[0]);
}

// f(b, first, count) for runs of the n elements of each sample.
template <class F>
void each_run(int64_t batch, int64_t n, F f) {
  constexpr int64_t kRun = 8192, kAlone = 32768;  // elements of a run, and of what one thread does alone
  const int64_t runs = (n + kRun - 1) / kRun;
  torch::stable::parallel_for(0, batch * runs, std::max<int64_t>(1, kAlone / std::min(n, kRun)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * kRun;
      f(i / runs, first, std::min(kRun, n - first));
    }
  });
}

// z, r = sigmoid(xp + hp), rh = r h.
template <class T>
struct LibraryGates {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* xz, const T* xr, const T* hz, const T* hr, const A* h, T* z, T* r, T* rh, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A ri = sigmoid(load(xr[i]) + load(hr[i]));
      store(z[i], sigmoid(load(xz[i]) + load(hz[i])));
      store(r[i], ri);
      store(rh[i], ri * h[i]);
    }
  }
};

// c = tanh(xc + hc), h += z (c - h), also to out and to the frame that the next convolution reads.
template <class T>
struct LibraryUpdate {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* xc, const T* hc, const T* z, A* h, T* c, T* out, T* frame, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A ci = tanh_(load(xc[i]) + load(hc[i]));
      const A next = h[i] + load(z[i]) * (ci - h[i]);
      store(c[i], ci);
      store(out[i], next);
      h[i] = next;
      store(frame[i], next);
    }
  }
};

// From dL/dh' = dh + through + dout the gradients of the pre-activations of z and c, twice each, and what passes to h; a copy of h.
template <class T>
struct LibraryUpdateBackward {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* through, const T* dout, const T* z, const T* c, const T* h, A* dh, T* dz, T* dc, T* dz2,
                                 T* dc2, T* h2, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A up = dh[i] + load(through[i]) + load(dout[i]), zi = load(z[i]), ci = load(c[i]);
      const A daz = up * (ci - load(h[i])) * zi * (A(1) - zi), dac = up * zi * (A(1) - ci * ci);
      h2[i] = h[i];
      store(dz[i], daz);
      store(dc[i], dac);
      store(dz2[i], daz);
      store(dc2[i], dac);
      dh[i] = up * (A(1) - zi);
    }
  }
};

// From dL/d(r h) the gradient of the pre-activation of r, twice, and what passes to h; rh again.
template <class T>
struct LibraryGatesBackward {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* drh, const T* r, const T* h, A* dh, T* dr, T* dr2, T* rh, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A up = load(drh[i]), ri = load(r[i]), hi = load(h[i]);
      const A dar = up * hi * ri * (A(1) - ri);
      store(dr[i], dar);
      store(dr2[i], dar);
      store(rh[i], ri * hi);
      dh[i] += up * ri;
    }
  }
};

template <class T>
struct Accumulate {
  static CONVRNN_INLINE void run(const T* x, acc_t<T>* sum, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += load(x[i]);
    }
  }
};

// Between planes [channel][pixel] and what is kept [pixel][channel].
template <class T>
struct Turn {
  static CONVRNN_INLINE void run(const T* from, T* to, int64_t rows, int64_t columns) {  // from[rows][columns]
    constexpr int64_t kSide = 16;
    for (int64_t first = 0; first < columns; first += kSide) {
      const int64_t last = std::min(columns, first + kSide);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = first; column < last; ++column) {
          to[column * rows + row] = from[row * columns + column];
        }
      }
    }
  }
};

// What forward and backward share.
template <class T>
struct Planes {
  const Problem& p;
  int64_t n;  // elements of a sample's state
  explicit Planes(const Problem& problem) : p(problem), n(problem.channels * problem.pixels()) {}

  bool same() const {  // in either order
    return p.channels == 1 || p.pixels() == 1;
  }
  // z, r and c of a step, [sample][gate][channel][pixel], to those kept; and from them, where each sample's are returned.
  void keep(const T* zrc, T* kept, int64_t t) const {
    each_plane([&](int64_t b, int64_t gate) {
      run<Turn<T>>(zrc + (3 * b + gate) * n, kept + ((b * p.steps + t) * 3 + gate) * n, p.channels, p.pixels());
    });
  }
  auto kept(const T* kept, T* zrc, int64_t t) const {
    if (!same()) {
      each_plane([&](int64_t b, int64_t gate) {
        run<Turn<T>>(kept + ((b * p.steps + t) * 3 + gate) * n, zrc + (3 * b + gate) * n, p.pixels(), p.channels);
      });
    }
    const T* const first = same() ? kept + 3 * t * n : zrc;
    const int64_t step = same() ? 3 * p.steps * n : 3 * n;
    return [=](int64_t b) { return first + b * step; };
  }

 private:
  template <class F>
  void each_plane(F f) const {
    torch::stable::parallel_for(0, 3 * p.batch, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(i / 3, i % 3);
      }
    });
  }
};

// A tensor in memory that the next call takes (buffer.h): it must not be returned.
template <class T>
class Scratch {
 public:
  // Of x's kind: (frames, channels, *S), S that of x (B, T, channels, *S).
  Scratch(const Tensor& x, int64_t frames, int64_t channels) : buffer_(frames * channels * numel(shape(x), 3)) {
    Shape sizes = shape(x);
    sizes.erase(sizes.begin());
    sizes[0] = frames;
    sizes[1] = channels;
    const Shape strides = dense_strides(sizes);
    AtenTensorHandle handle = nullptr;
    const auto dtype = std::is_same_v<T, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
    STD_TORCH_CHECK(aoti_torch_create_tensor_from_blob(buffer_.data(), x.dim() - 1, sizes.data(), strides.data(), 0, dtype,
                                                       aoti_torch_device_type_cpu(), -1, &handle) == AOTI_TORCH_SUCCESS,
                    "convrnn::gru_rcn: no tensor of scratch");
    tensor_ = Tensor(handle);
  }
  T* data() {
    return buffer_.data();
  }
  const Tensor& tensor() const {
    return tensor_;
  }

 private:
  Buffer<T> buffer_;
  Tensor tensor_;
};

// (frames, channels, *S) of a tensor that holds such frames one after the other.
Tensor frames_of(const Tensor& x, int64_t channel_dim) {
  Shape sizes = shape(x);
  sizes.erase(sizes.begin(), sizes.begin() + channel_dim);
  sizes.insert(sizes.begin(), -1);
  return reshape(x, sizes);
}

}  // namespace

template <class T>
void library_forward(const Problem& p, const Tensor& x, bool has_h0, const OptionalTensor& W, const Tensor& U_, const Tensor& C_,
                     const OptionalTensor& bias, const Tensor& out, const Tensor& h_n, const Tensor& gates) {
  using A = acc_t<T>;
  const Tensor U = reaching(U_, x), C = reaching(C_, x);
  const Planes<T> planes(p);
  const int64_t n = planes.n;
  const Tensor xs = torch::stable::contiguous(x);
  const Tensor projection = W.has_value() ? convolve(frames_of(xs, 2), reaching(*W, x), bias) : xs;
  Tensor frame = std::is_same_v<T, A> ? h_n : torch::stable::to(h_n, x.scalar_type());
  Scratch<T> rh(x, p.batch, p.channels), zrc(x, p.batch, 3 * p.channels), zeros(x, 1, 2 * p.channels);
  std::fill_n(zeros.data(), 2 * n, T(0.f));
  const bool keep = gates.numel() > 0;
  const T* xp = data<T>(projection);
  A* const h = mutable_data<A>(h_n);
  for (int64_t t = 0; t < p.steps; ++t) {
    const bool zero = t == 0 && !has_h0;
    const auto of = [&](const T* all, int64_t b, int64_t gate) { return all + ((b * p.steps + t) * 3 + gate) * n; };
    const Tensor through_u = zero ? zeros.tensor() : convolve(frame, U);
    const T* hp = data<T>(through_u);
    T* const products = rh.data();
    const bool direct = keep && planes.same();
    T* const activations = direct ? mutable_data<T>(gates) + 3 * t * n : zrc.data();
    const int64_t sample = direct ? 3 * p.steps * n : 3 * n;
    each_run(p.batch, n, [&](int64_t b, int64_t i, int64_t count) {
      const T* of_h = hp + (zero ? 0 : 2 * b * n) + i;
      T* z = activations + b * sample + i;
      run<LibraryGates<T>>(of(xp, b, 0) + i, of(xp, b, 1) + i, of_h, of_h + n, static_cast<const A*>(h + b * n + i), z, z + n,
                           products + b * n + i, count);
    });
    const Tensor through_c = zero ? zeros.tensor() : convolve(rh.tensor(), C);
    const T* hc = data<T>(through_c);
    T *states = mutable_data<T>(out), *next = mutable_data<T>(frame);
    each_run(p.batch, n, [&](int64_t b, int64_t i, int64_t count) {
      T* z = activations + b * sample + i;
      run<LibraryUpdate<T>>(of(xp, b, 2) + i, hc + (zero ? 0 : b * n) + i, static_cast<const T*>(z), h + b * n + i, z + 2 * n,
                            states + (b * p.steps + t) * n + i, next + b * n + i, count);
    });
    if (keep && !direct) {
      planes.keep(activations, mutable_data<T>(gates), t);
    }
  }
}

template <class T>
void library_backward(const Problem& p, const Operands& operands, const Tensor& gates, Tensor& dh, Gradients& wanted) {
  using A = acc_t<T>;
  const Planes<T> planes(p);
  const int64_t n = planes.n, steps = p.steps, batch = p.batch;
  const Tensor& x = operands.x;
  const Tensor U = reaching(operands.U, x), C = reaching(operands.C, x);
  const bool has_h0 = operands.h0.has_value(), has_dout = operands.dout.has_value();
  const bool projects = operands.W.has_value();
  const bool wants_r = wanted.dx.has_value() || wanted.dh0 || wanted.dW.has_value() || wanted.dU.has_value() || wanted.dbias.has_value();
  const Tensor out = torch::stable::contiguous(operands.out);
  const Tensor dout = torch::stable::contiguous(has_dout ? *operands.dout : operands.out);
  // Gradients of the pre-activations, in x's order for the input convolution and step by step for the recurrent ones, and what
  // these read.
  Scratch<T> da(x, projects ? batch * steps : 0, 3 * p.channels);
  Scratch<T> dzr(x, steps * batch, 2 * p.channels), dc(x, steps * batch, p.channels);
  Scratch<T> hs(x, steps * batch, p.channels), rhs(x, steps * batch, p.channels);
  Scratch<T> zrc(x, batch, 3 * p.channels), zeros(x, 1, p.channels);
  std::fill_n(zeros.data(), n, T(0.f));
  const Tensor first = has_h0 ? torch::stable::contiguous(to_dtype(*operands.h0, x.scalar_type())) : zeros.tensor();
  // Without W these are dx.
  const Tensor das = projects ? da.tensor() : empty(x, shape(x));
  const T *no = zeros.data(), *states = data<T>(out), *ups = data<T>(dout);
  A* const up = mutable_data<A>(dh);
  T *const h_all = hs.data(), *const rh_all = rhs.data(), *const da_all = mutable_data<T>(das);
  T *const dzr_all = dzr.data(), *const dc_all = dc.data(), *const zs = zrc.data();
  const auto step_of = [&](const Scratch<T>& all, int64_t t) {
    return call("aten::narrow", all.tensor(), int64_t{0}, t * batch, batch);
  };
  OptionalTensor through;  // what the step behind passes on through U
  for (int64_t t = steps - 1; t >= 0; --t) {
    const auto of_step = planes.kept(data<T>(gates), zs, t);
    const T* const passed = through.has_value() ? data<T>(*through) : no;
    const bool added = through.has_value();
    each_run(batch, n, [&](int64_t b, int64_t i, int64_t count) {
      const T* z = of_step(b) + i;
      const T* h = (t > 0 ? states + (b * steps + t - 1) * n : data<T>(first) + (has_h0 ? b * n : 0)) + i;
      T* const da_b = da_all + (b * steps + t) * 3 * n + i;
      const int64_t at = t * batch + b;
      // zeros hold one sample's
      run<LibraryUpdateBackward<T>>(added ? passed + b * n + i : no + i, has_dout ? ups + (b * steps + t) * n + i : no + i, z,
                                    z + 2 * n, h, up + b * n + i, da_b, da_b + 2 * n, dzr_all + 2 * at * n + i,
                                    dc_all + at * n + i, h_all + at * n + i, count);
    });
    const bool last = t == 0 && !(has_h0 && wants_r);  // r acted on a zero state, or nobody asks
    through.reset();
    OptionalTensor drh;
    if (!last) {
      drh = data_gradient(step_of(dc, t), step_of(rhs, t), C);
    }
    const T* const gradient = last ? no : data<T>(*drh);
    each_run(batch, n, [&](int64_t b, int64_t i, int64_t count) {
      const int64_t at = t * batch + b;
      run<LibraryGatesBackward<T>>(last ? no + i : gradient + b * n + i, of_step(b) + n + i,
                                   static_cast<const T*>(h_all + at * n + i), up + b * n + i,
                                   da_all + ((b * steps + t) * 3 + 1) * n + i, dzr_all + (2 * at + 1) * n + i,
                                   rh_all + at * n + i, count);
    });
    if (!last && (t > 0 || wanted.dh0)) {
      through = data_gradient(step_of(dzr, t), step_of(hs, t), U);
    }
  }
  if (wanted.dh0 && through.has_value()) {
    const T* const passed = data<T>(*through);
    each_run(1, batch * n, [&](int64_t, int64_t i, int64_t count) { run<Accumulate<T>>(passed + i, up + i, count); });
  }
  if (projects && (wanted.dx.has_value() || wanted.dW.has_value() || wanted.dbias.has_value())) {
    const auto found = convolve_backward(das, frames_of(torch::stable::contiguous(x), 2), reaching(*operands.W, x),
                                         {wanted.dx.has_value(), wanted.dW.has_value(), wanted.dbias.has_value()});
    if (wanted.dx.has_value()) {
      wanted.dx = dense(reshape(found[0], shape(x)));
    }
    if (wanted.dW.has_value()) {
      wanted.dW = whole_gradient(found[1], *operands.W);
    }
    if (wanted.dbias.has_value()) {
      wanted.dbias = dense(found[2]);
    }
  } else if (wanted.dx.has_value()) {
    wanted.dx = das;
  }
  if (wanted.dU.has_value()) {
    wanted.dU = whole_gradient(convolve_backward(dzr.tensor(), hs.tensor(), U, {false, true, false})[1], operands.U);
  }
  if (wanted.dC.has_value()) {
    wanted.dC = whole_gradient(convolve_backward(dc.tensor(), rhs.tensor(), C, {false, true, false})[1], operands.C);
  }
}

namespace {

// What a pass takes, in microseconds of two threads. The numbers are fitted to a sweep of shapes: kernels/README.md.
struct OwnCost {
  double call, product, pair, narrow, lane, lane16, input, weight;  // lane16: of bfloat16 tensors
};
struct LibraryCost {
  double convolution, product, pair, narrow, lane, input, outputs, inputs;
};
constexpr OwnCost kOwn[] = {{111, 0.0090, 0.49, 4.6, 0.0020, 0.0026, 0.00063, 0.00050}, {279, 0.0179, 0.54, 3.0, 0.0101, 0.0249, 0.0022, 0.0020}};
constexpr LibraryCost kLibrary[] = {{103, 0.0159, 0.0041, 1.45, 0.0059, 0.00041, 9, 1.1}, {268, 0.0281, 0.0158, 1.39, 0.0227, 0.00092, 9, 3.6}};

double of(int64_t n) {
  return static_cast<double>(n);
}

// The taps of a kernel that meet some pixel of the frame.
double reaching_taps(const Size& kernel, const Size& size) {
  return of(std::min(kernel.depth, 2 * size.depth - 1)) * of(std::min(kernel.height, 2 * size.height - 1)) *
         of(std::min(kernel.width, 2 * size.width - 1));
}

// Products of this library's convolution for a pixel, an output lane and all gates of one input channel, in direct ones of float32.
double own_products(const Problem& p, const Size& kernel, const Channels& in, int64_t gates, bool pairs, double pair) {
  const ConvShape shape{p.frame, kernel, false, in, p.planes(gates)};
  const double taps = reaching_taps(kernel, p.frame.size), tile = of(shape.tile(pairs));
  if (tile == 0) {
    return taps * (pairs ? pair : 1);
  }
  const double tiles = std::ceil(of(p.frame.size.height) / tile) * std::ceil(of(p.frame.size.width) / tile);
  return 1.2 * (tile + 2) * (tile + 2) * tiles * of(Blocks(kernel).count()) / of(p.pixels());
}

bool is_cheaper(const Problem& p, bool projects, bool bfloat16, bool backward) {
  const OwnCost& own = kOwn[backward];
  const LibraryCost& library = kLibrary[backward];
  const double frames = of(p.batch * p.steps * p.pixels()), lanes = of(p.pitch), state = of(p.channels);
  const double inputs = projects ? of(p.inputs) : 0;
  double own_sum = 0, library_sum = 0, weights = 0;
  const auto add = [&](const Size& kernel, const Channels& in, int64_t gates) {
    const bool pairs = bfloat16 && in.lanes() % 2 == 0 && p.frame.size.depth == 1;
    own_sum += own_products(p, kernel, in, gates, pairs, own.pair) * of(gates * in.count) * lanes;
    library_sum += reaching_taps(kernel, p.frame.size) * std::max(of(gates) * state, library.outputs) * std::max(of(in.count), library.inputs);
    weights += of(kernel.pixels() * gates * in.count) * lanes;
  };
  if (projects) {
    add(p.w, p.input(), 3);
  }
  add(p.u, p.state(), 2);
  add(p.c, p.state(), 1);
  const double width = of(p.frame.size.width);
  const double own_time = own.call + frames * own_sum * own.product * 1e-3 * (1 + own.narrow / width) +
                          frames * lanes * (bfloat16 ? own.lane16 : own.lane) + frames * inputs * own.input +
                          weights * own.weight;
  const double library_time = library.convolution * (2 * of(p.steps) + 1) +
                              frames * library_sum * (bfloat16 ? library.pair : library.product) * 1e-3 * (1 + library.narrow / width) +
                              frames * state * library.lane + frames * inputs * library.input;
  return library_time < own_time;
}

}  // namespace

bool takes_library(const Problem& p, const Tensor& x, bool projects, const Codes& codes, bool backward) {
  const char* const chosen = std::getenv("CONVRNN_CPU_CONV");
  const std::string choice = chosen == nullptr || *chosen == 0 ? "auto" : chosen;
  STD_TORCH_CHECK(choice == "auto" || choice == "own" || choice == "library",
                  "CONVRNN_CPU_CONV: expected auto, own or library, got '", choice, "'");
#ifdef CONVRNN_X86
  constexpr bool kMeasured = true;
#else
  constexpr bool kMeasured = false;  // nor is it known what the library takes there
#endif
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  // In bfloat16 the library's weight gradients of volumes hold what it did not write.
  bool fits = kMeasured && !codes.any() &&
              (x.scalar_type() == ScalarType::Float || (bfloat16 && multiplies_pairs() && x.dim() < 6));
  for (const Size& kernel : {p.w, p.u, p.c}) {
    fits = fits && kernel.depth % 2 == 1 && kernel.height % 2 == 1 && kernel.width % 2 == 1;
  }
  // The library projects all frames at once: not where that would take much memory.
  constexpr int64_t kMost = 64 << 20;
  const bool small = p.batch * p.steps * 3 * p.channels * p.pixels() <= kMost / static_cast<int64_t>(bfloat16 ? sizeof(c10::BFloat16) : sizeof(float));
  return fits && choice != "own" && (choice == "library" || (small && is_cheaper(p, projects, bfloat16, backward)));
}

#define CONVRNN_INSTANTIATE(T)                                                                                              \
  template void library_forward<T>(const Problem&, const Tensor&, bool, const OptionalTensor&, const Tensor&, const Tensor&, \
                                   const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&);                      \
  template void library_backward<T>(const Problem&, const Operands&, const Tensor&, Tensor&, Gradients&);
CONVRNN_INSTANTIATE(float)
CONVRNN_INSTANTIATE(c10::BFloat16)
#undef CONVRNN_INSTANTIATE

}  // namespace convrnn
