// Every schema of the library, and nothing else. Kernels register themselves in <family>.cpp; fake
// kernels are in bayes_kernels/functional/<family>.py, definitions in bayes_kernels/reference.py.
#include "torch_stable.h"

STABLE_TORCH_LIBRARY(BK_LIBRARY, m) {
  // noise
  m.def("fold_in(Tensor key, SymInt data) -> Tensor");
  m.def("normal(Tensor key, SymInt stream, SymInt[] size) -> Tensor");
  m.def(
      "sign_bits(Tensor key, SymInt stream, bool output, SymInt rows, SymInt columns, SymInt row0, "
      "SymInt rows_per_id, Tensor? ids) -> Tensor");
  m.def(
      "dropout_mask(Tensor key, SymInt stream, SymInt rows, SymInt columns, SymInt row0, float p) "
      "-> Tensor");
  m.def("scaled_normal(Tensor rho, SymInt n, Tensor key, SymInt stream, str std) -> Tensor");
  m.def(
      "scaled_normal_backward(Tensor de, Tensor rho, Tensor key, SymInt stream, str std) -> "
      "Tensor");
  m.def(
      "gaussian_draws(Tensor mean, Tensor rho, Tensor draws, Tensor key, SymInt stream, str std, "
      "bool antithetic) -> Tensor");
  m.def(
      "gaussian_draws_backward(Tensor grad, Tensor rho, Tensor draws, Tensor key, SymInt stream, "
      "str "
      "std, bool antithetic, bool need_mean, bool need_rho) -> (Tensor, Tensor)");

  // activations
  m.def(
      "quantize_activations(Tensor x, Tensor key, SymInt stream, SymInt row0) -> (Tensor, Tensor)");
  m.def("dequantize_activations(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor");

  // adapter
  m.def(
      "adapter_shrink(Tensor x, Tensor a, Tensor? e, Tensor? key, SymInt stream, SymInt row0, "
      "SymInt rows_per_id, Tensor? ids, float dropout) -> Tensor");
  m.def(
      "adapter_shrink_backward(Tensor dh, Tensor x, Tensor a, Tensor? e, Tensor? key, SymInt "
      "stream, "
      "SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, bool need_dx, bool need_da, "
      "bool need_de) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adapter_expand(Tensor h, Tensor b, Tensor? base, float scaling, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "adapter_forward(Tensor x, Tensor a, Tensor? rho, Tensor b, Tensor? base, Tensor? key, "
      "SymInt stream, SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, str std, "
      "float scaling) -> (Tensor, Tensor)");
  m.def(
      "adapter_train(Tensor x, Tensor a, Tensor? rho, Tensor b, Tensor? base, Tensor? key, SymInt "
      "stream, SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, str std, float "
      "scaling) -> (Tensor?, Tensor?)");
  m.def(
      "adapter_infer(Tensor x, Tensor a, Tensor? rho, Tensor b, Tensor? base, Tensor? key, SymInt "
      "stream, SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, str std, float "
      "scaling) -> Tensor?");
  m.def(
      "adapter_group(Tensor x, Tensor[] a, Tensor[] rho, Tensor[] b, Tensor[] base, Tensor? key, "
      "SymInt[] streams, SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, str std, "
      "float[] scaling, bool train) -> (Tensor[], Tensor[])");
  m.def(
      "adapter_backward(Tensor dy, Tensor x, Tensor a, Tensor? rho, Tensor b, Tensor h, Tensor? "
      "key, SymInt stream, SymInt row0, SymInt rows_per_id, Tensor? ids, float dropout, str std, "
      "float scaling, bool need_dx, bool need_da, bool need_drho, bool need_db) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "adapter_expand_backward(Tensor dy, Tensor h, Tensor b, float scaling, bool need_dh, "
      "bool need_db) -> (Tensor, Tensor)");

  // grouped
  m.def("group_rows(Tensor ids, SymInt groups) -> Tensor");
  m.def(
      "grouped_forward(Tensor x, Tensor a, Tensor? e, Tensor b, Tensor? base, Tensor? plan, SymInt "
      "rows_per_group, Tensor? key, SymInt stream, SymInt row0, Tensor? ids, float scaling) -> "
      "(Tensor, Tensor)");
  m.def(
      "sampled_forward(Tensor x, Tensor mean, Tensor rho, Tensor b, Tensor? base, Tensor draws, "
      "Tensor? plan, SymInt rows_per_group, Tensor key, SymInt stream, str std, bool antithetic, "
      "float scaling) -> (Tensor, Tensor)");
  m.def(
      "grouped_backward(Tensor dy, Tensor x, Tensor a, Tensor? e, Tensor b, Tensor h, Tensor? "
      "plan, "
      "SymInt rows_per_group, Tensor? key, SymInt stream, SymInt row0, Tensor? ids, float scaling, "
      "bool need_dx, bool need_da, bool need_de, bool need_db) -> (Tensor, Tensor, Tensor, "
      "Tensor)");

  // divergence
  m.def(
      "gaussian_kl(Tensor[] means, Tensor[] rhos, float[] prior_std, str std, str direction) -> "
      "Tensor");
  m.def(
      "gaussian_kl_backward(Tensor weight, Tensor[] means, Tensor[] rhos, float[] prior_std, str "
      "std, "
      "str direction) -> (Tensor[], Tensor[])");
  m.def(
      "gaussian_kl_step_(Tensor(a!)[] means, Tensor(b!)[] rhos, Tensor weight, float[] prior_std, "
      "str std, str direction) -> ()");

  // tall
  m.def("tall_gram(Tensor[] xs) -> Tensor[]");
  m.def("tall_retract_(Tensor(a!)[] xs, Tensor[] steps, str retraction) -> Tensor");
  m.def(
      "tall_stiefel_step_(Tensor(a!)[] xs, Tensor[] directions, Tensor lr, str retraction) -> "
      "Tensor");
  m.def("tall_landing_field(Tensor[] xs, Tensor[] grads, Tensor lam) -> Tensor[]");
  m.def("tall_landing_step_(Tensor(a!)[] xs, Tensor[] grads, Tensor lr, Tensor lam) -> ()");

  // predict
  m.def(
      "mc_predict(Tensor mean, Tensor cov, Tensor key, SymInt stream, SymInt row0, Tensor? ids, "
      "SymInt n_samples, bool antithetic, bool standard_error) -> (Tensor, Tensor, Tensor, "
      "Tensor)");

  // curvature
  m.def("low_rank_update_(Tensor(a!)[] factors, Tensor[] rows) -> ()");
  m.def(
      "kron_accumulate_(Tensor(a!)[] factors, Tensor[] rows, Tensor[] masks, Tensor beta, Tensor "
      "alpha) -> ()");

  m.def("build_info() -> str");
}
