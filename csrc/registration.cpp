// What the CPU extension adds to the `mpvg` namespace beside its operators (schemas: mpvg_kernels/ops; kernels: registered in cpu/).
#include "cpu/host.h"

namespace mpvg {

// The instruction set in use. With a name ("avx512", "avx2", "baseline"; "" for the fastest) that one is used from now on.
std::string cpu_isa(std::optional<std::string> use) {
  STD_TORCH_CHECK(!use || use_isa(use->c_str()), "mpvg: this machine or this build has no CPU kernels named '", *use, "'");
  return kernels().isa;
}

STABLE_TORCH_LIBRARY_FRAGMENT(mpvg, m) { m.def("cpu_isa(str? use=None) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(mpvg, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace mpvg
