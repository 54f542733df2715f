#include "math.h"

namespace convrnn {

const float kLeastExponent = -87.3f;

}  // namespace convrnn
