// The kernels for what every machine of the architecture has: SSE2 on x86-64, NEON on arm64, whatever 16-byte vectors map to elsewhere.
#include "kernels.h"

#ifdef MPVG_X86
#include <immintrin.h>
#endif

#define MPVG_ISA baseline
#define MPVG_VECTOR_BYTES 16

#include "isa.h"

namespace mpvg {
extern const Kernels kernels_baseline = baseline::table("baseline", [] { return true; });
}
