// The schemas of every op. They live in C++ so that a TorchScript archive or an AOTInductor package that uses them
// loads in a process that knows this library alone. Kernels: here (CPU) and in convrnn/ops (CUDA).
//
// Scripted archives keep the schema they were saved with: new arguments (a reset mask, lengths, dilation, ...) are
// added at the end and with a default.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(convrnn, m) {
  // `codes` (B, T) uint8, one for each frame: bit 0 restarts the state before it, bit 1 then holds the state through it.
  m.def("mingru(Tensor gate_hidden, Tensor? h0=None, Tensor? codes=None) -> (Tensor h, Tensor h_n)");
  m.def(
      "mingru_backward(Tensor? dh, Tensor? dh_n, Tensor gate_hidden, Tensor? h0, Tensor h, Tensor? codes=None)"
      " -> (Tensor dgate_hidden, Tensor dh0)");

  m.def("log_scan(Tensor log_a, Tensor log_b) -> Tensor log_x");
  m.def(
      "log_scan_backward(Tensor dlog_x, Tensor log_a, Tensor log_b, Tensor log_x)"
      " -> (Tensor dlog_a, Tensor dlog_b)");

  m.def("gru_gates(Tensor xp, Tensor hp, Tensor h) -> (Tensor z, Tensor r, Tensor rh)");
  m.def(
      "gru_gates_backward(Tensor dz, Tensor dr, Tensor drh, Tensor z, Tensor r, Tensor h)"
      " -> (Tensor da, Tensor dh)");
  m.def("gru_update(Tensor xc, Tensor hc, Tensor z, Tensor h) -> (Tensor c, Tensor h_next)");
  m.def(
      "gru_update_backward(Tensor dc, Tensor dh_next, Tensor z, Tensor c, Tensor h)"
      " -> (Tensor da, Tensor dz, Tensor dh)");

  // `gates` holds z, r and c in the order of the device's kernels: for the backward of the same device alone. Without
  // elements (keep_gates=False) they are computed again, for which the backward must be given the bias of the forward.
  // Without W, x is the projection (B, T, 3*Oh, *S) itself and there is no bias; the backward reads it only where gates has
  // no elements, and dW and dbias have none.
  // `codes` as of mingru; a restart is from zeros. The backward reads no activations of a frame that is held.
  m.def(
      "gru_rcn(Tensor x, Tensor? h0, Tensor? W, Tensor U, Tensor C, Tensor? bias=None, bool keep_gates=True,"
      " Tensor? codes=None)"
      " -> (Tensor out, Tensor h_n, Tensor gates)");
  m.def(
      "gru_rcn_backward(Tensor? dout, Tensor? dh_n, Tensor x, Tensor? h0, Tensor? W, Tensor U, Tensor C,"
      " Tensor out, Tensor gates, bool[6] output_mask, Tensor? bias=None, Tensor? codes=None)"
      " -> (Tensor dx, Tensor dh0, Tensor dW, Tensor dU, Tensor dC, Tensor dbias)");

  m.def("cpu_isa() -> str");
}
