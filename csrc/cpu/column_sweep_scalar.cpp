// The portable set of kernels; the others are compiled with their instruction set's flags.
#include "cpu/column_sweep_impl.h"

namespace losa::column_sweep {

void sweep_panel_scalar(const Panel& panel) {
  sweep_panel(panel);
}

}  // namespace losa::column_sweep
