#pragma once

namespace kvlink::bindings {

// Makes kvlink's C++ errors arrive as the classes of kvlink.errors.
void register_exceptions();

}  // namespace kvlink::bindings
