// gru_gates and gru_update as ops of their own: one GRU-RCN step between its convolutions.

#include "gru_gates.h"

#include "tensor.h"

namespace convrnn {
namespace {

// The layout of a call's frames: that of one of its tensors. A row (everything behind the batch dimension) is dense and
// holds `runs` of `lanes`; where it holds pairs of gates, each run is one of z and then one of r. Batch strides are free.
struct Frames {
  bool channels_last;
  int64_t runs, lanes;

  Frames(const Tensor& like, const Tensor& h)
      : channels_last(is_channels_last(like, 1)),
        runs(channels_last ? numel(shape(h), 2) : 1),
        lanes(channels_last ? h.size(1) : numel(shape(h), 1)) {
  }

  Tensor operator()(const Tensor& x) const {
    return to_layout(x, 1, channels_last);
  }

  Tensor empty(const Tensor& like, const Shape& sizes) const {
    return convrnn::empty(like, sizes, like.scalar_type(), 1, channels_last);
  }
};

// Calls f(T{}, S{}): T the dtype of `x`, S that of the state `h`, which is T or the accumulation type of T.
template <class F>
void dispatch_state(const char* op, const Tensor& x, const Tensor& h, F f) {
  dispatch_dtype(op, x, [&](auto zero) {
    using T = decltype(zero);
    if (h.scalar_type() == x.scalar_type()) {
      return f(T{}, T{});
    }
    STD_TORCH_CHECK(h.scalar_type() == state_dtype(x), op, ": expected h in the dtype of the gates or in float32");
    f(T{}, acc_t<T>{});
  });
}

void check(const char* op, const Tensor& h, std::initializer_list<std::pair<Tensor, int64_t>> others) {
  STD_TORCH_CHECK(h.dim() >= 2, op, ": expected h of shape (B, C, *S)");
  for (const auto& [x, times] : others) {
    Shape expected = shape(h);
    expected[1] *= times;
    STD_TORCH_CHECK(shape(x) == expected, op, ": shapes do not match h");
    STD_TORCH_CHECK(x.scalar_type() == others.begin()->first.scalar_type(), op, ": dtypes do not match");
  }
}

std::tuple<Tensor, Tensor, Tensor> gru_gates(const Tensor& xp_, const Tensor& hp_, const Tensor& h_) {
  check("convrnn::gru_gates", h_, {{xp_, 2}, {hp_, 2}});
  const Frames frames(hp_, h_);
  const Tensor xp = frames(xp_), hp = frames(hp_), h = frames(h_);
  Tensor z = frames.empty(xp, shape(h)), r = frames.empty(xp, shape(h)), rh = frames.empty(xp, shape(h));
  dispatch_state("convrnn::gru_gates", xp, h, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const auto pxp = in<T>(xp), php = in<T>(hp);
    const auto ph = in<S>(h);
    const auto pz = out<T>(z), pr = out<T>(r), prh = out<T>(rh);
    const int64_t n = frames.lanes;
    for_rows(h.size(0), [&](int64_t b) {
      for (int64_t i = 0; i < frames.runs * n; i += n) {
        run<Gates<T, S>>(pxp[b] + 2 * i, php[b] + 2 * i, ph[b] + i, pz[b] + i, pr[b] + i, prh[b] + i, n);
      }
    });
  });
  return {z, r, rh};
}

std::tuple<Tensor, Tensor> gru_update(const Tensor& xc_, const Tensor& hc_, const Tensor& z_, const Tensor& h_) {
  check("convrnn::gru_update", h_, {{xc_, 1}, {hc_, 1}, {z_, 1}});
  const Frames frames(hc_, h_);
  const Tensor xc = frames(xc_), hc = frames(hc_), z = frames(z_), h = frames(h_);
  Tensor c = frames.empty(xc, shape(h)), h_next = frames.empty(h, shape(h));
  const int64_t n = numel(shape(h), 1);
  dispatch_state("convrnn::gru_update", xc, h, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const auto pxc = in<T>(xc), phc = in<T>(hc), pz = in<T>(z);
    const auto ph = in<S>(h);
    const auto pc = out<T>(c);
    const auto pn = out<S>(h_next);
    for_rows(h.size(0), [&](int64_t b) { run<Update<T, S>>(pxc[b], phc[b], pz[b], ph[b], pc[b], pn[b], n); });
  });
  return {c, h_next};
}

std::tuple<Tensor, Tensor> gru_gates_backward(const Tensor& dz_, const Tensor& dr_, const Tensor& drh_,
                                              const Tensor& z_, const Tensor& r_, const Tensor& h_) {
  check("convrnn::gru_gates_backward", h_, {{dz_, 1}, {dr_, 1}, {drh_, 1}, {z_, 1}, {r_, 1}});
  const Frames frames(z_, h_);
  const Tensor dz = frames(dz_), dr = frames(dr_), drh = frames(drh_), z = frames(z_), r = frames(r_), h = frames(h_);
  Shape packed = shape(h);
  packed[1] *= 2;
  Tensor da = frames.empty(z, packed), dh = frames.empty(h, shape(h));
  dispatch_state("convrnn::gru_gates_backward", z, h, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const auto pdz = in<T>(dz), pdr = in<T>(dr), pdrh = in<T>(drh), pz = in<T>(z), pr = in<T>(r);
    const auto ph = in<S>(h);
    const auto pda = out<T>(da);
    const auto pdh = out<S>(dh);
    const int64_t n = frames.lanes;
    for_rows(h.size(0), [&](int64_t b) {
      for (int64_t i = 0; i < frames.runs * n; i += n) {
        run<GatesBackward<T, S>>(pdz[b] + i, pdr[b] + i, pdrh[b] + i, pz[b] + i, pr[b] + i, ph[b] + i,
                                 pda[b] + 2 * i, pdh[b] + i, n);
      }
    });
  });
  return {da, dh};
}

std::tuple<Tensor, Tensor, Tensor> gru_update_backward(const Tensor& dc_, const Tensor& dh_next_, const Tensor& z_,
                                                       const Tensor& c_, const Tensor& h_) {
  check("convrnn::gru_update_backward", h_, {{dc_, 1}, {z_, 1}, {c_, 1}});
  check("convrnn::gru_update_backward", h_, {{dh_next_, 1}, {h_, 1}});
  const Frames frames(c_, h_);
  const Tensor dc = frames(dc_), dh_next = frames(dh_next_), z = frames(z_), c = frames(c_), h = frames(h_);
  Tensor da = frames.empty(c, shape(h)), dz = frames.empty(c, shape(h)), dh = frames.empty(h, shape(h));
  const int64_t n = numel(shape(h), 1);
  dispatch_state("convrnn::gru_update_backward", c, h, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const auto pdc = in<T>(dc), pz = in<T>(z), pc = in<T>(c);
    const auto pup = in<S>(dh_next), ph = in<S>(h);
    const auto pda = out<T>(da), pdz = out<T>(dz);
    const auto pdh = out<S>(dh);
    for_rows(h.size(0), [&](int64_t b) {
      run<UpdateBackward<T, S>>(pdc[b], pup[b], pz[b], pc[b], ph[b], pda[b], pdz[b], pdh[b], n);
    });
  });
  return {da, dz, dh};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("gru_gates", TORCH_BOX(&convrnn::gru_gates));
  m.impl("gru_gates_backward", TORCH_BOX(&convrnn::gru_gates_backward));
  m.impl("gru_update", TORCH_BOX(&convrnn::gru_update));
  m.impl("gru_update_backward", TORCH_BOX(&convrnn::gru_update_backward));
}
