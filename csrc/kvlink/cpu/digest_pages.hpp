#pragma once

#include "kvlink/params/relayout_pages.hpp"

namespace kvlink::cpu {

// Rows and digest of a run as it is stored (see base/row_digest.hpp): what relayout_pages reports
// for a copy into this pool. Errors as there.
RelayoutResult digest_pages(const DigestParams& params);

}  // namespace kvlink::cpu
