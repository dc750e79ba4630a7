#pragma once

#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cpu {

// Copies the run, converted to the destination's layout, dtype and scales. Rows of one dtype whose
// scales mean the same keep their stored bytes (and scales per row); otherwise values go through
// float32: stored * source scale, then rounded into the destination, which uses its static scales
// or computes a scale per row. With with_digest the result's digest is that of what was written.
//
// Nothing is written unless all of the following hold.
// InvalidArgument: a number is out of range, head dimensions differ, a destination page is listed
// twice or is a source page as well. PageTableError: an entry that is used names no page.
// Unsupported: the two forms do not mean the same (separate and packed do).
RelayoutResult relayout_pages(const RelayoutParams& params);

}  // namespace kvlink::cpu
