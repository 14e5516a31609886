// Compiled with AVX-512 flags.
#include "cpu/column_sweep_impl.h"

namespace losa::column_sweep {

void sweep_panel_avx512(const Panel& panel) {
  sweep_panel(panel);
}

}  // namespace losa::column_sweep
