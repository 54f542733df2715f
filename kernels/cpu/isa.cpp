#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <vector>

namespace convrnn {
namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
};

std::vector<NamedIsa> available() {
  std::vector<NamedIsa> sets{{"plain", Isa::plain}};
#ifdef CONVRNN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back({"avx2", Isa::avx2});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      sets.push_back({"avx512", Isa::avx512});
      if (__builtin_cpu_supports("avx512bf16")) {
        sets.push_back({"avx512bf16", Isa::avx512bf16});
      }
    }
  }
#endif
  return sets;
}

NamedIsa choose() {
  const auto sets = available();
  const char* forced = std::getenv("CONVRNN_ISA");
  if (forced == nullptr || *forced == '\0') {
    return sets.back();
  }
  std::string names;
  for (const auto& set : sets) {
    if (std::string(forced) == set.name) {
      return set;
    }
    names += std::string(names.empty() ? "" : ", ") + set.name;
  }
  STD_TORCH_CHECK(false, "CONVRNN_ISA must be one of the sets this machine has (", names, "), got '", forced, "'");
}

const NamedIsa& chosen() {
  static const NamedIsa choice = choose();
  return choice;
}

}  // namespace

Isa isa() {
  return chosen().isa;
}

// "chosen:available,available,...": the set in use first.
std::string isa_report() {
  std::string report = std::string(chosen().name) + ":";
  const auto sets = available();
  for (size_t i = 0; i < sets.size(); ++i) {
    report += std::string(i ? "," : "") + sets[i].name;
  }
  return report;
}

}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&convrnn::isa_report));
}
