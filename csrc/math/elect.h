// TIES election of one element over the models (Yadav et al., 2023, section 3), on floats or on lanes of
// them.
//
// F is a float or a vector of floats with the functions of lanes_*.h: add_where(sum, mask, x), select(mask,
// a, b), positive_or_nan, negative, not_less, is_zero; Fill<F>::of(float) makes one.
#pragma once
#include "dtype.h"

namespace pk {

template <class F>
struct Fill {
  PK_HD static F of(float x) { return F::of(x); }
};

/// Four one-signed sums for any number of models; a draw elects the positive side. A NaN value counts as
/// positive, so it makes `pos`, the comparison and the result NaN without an instruction of its own.
template <class F>
struct Elect {
  F pos, neg, wpos, wneg;

  PK_HD Elect() : pos(Fill<F>::of(0)), neg(pos), wpos(pos), wneg(pos) {}
  PK_HD void add(F value, F share) {
    const auto up = positive_or_nan(value);
    const auto down = negative(value);
    pos = add_where(pos, up, value);
    neg = add_where(neg, down, value);
    wpos = add_where(wpos, up, share);
    wneg = add_where(wneg, down, share);
  }
  PK_HD F mean() const {
    const auto up = not_less(pos, -neg);
    const F share = select(up, wpos, wneg);
    return select(up, pos, neg) / select(is_zero(share), Fill<F>::of(1), share);
  }
};

/// The same where votes and values differ: the vote is the delta's own, the value carries the weight.
template <class F>
struct ElectPlain {
  F pos, neg, vpos, vneg, wpos, wneg;

  PK_HD ElectPlain() : pos(Fill<F>::of(0)), neg(pos), vpos(pos), vneg(pos), wpos(pos), wneg(pos) {}
  PK_HD void add(F vote, F value, F share) {
    const auto up = positive_or_nan(vote);
    const auto down = negative(vote);
    pos = add_where(pos, up, vote);
    neg = add_where(neg, down, vote);
    vpos = add_where(vpos, up, value);
    vneg = add_where(vneg, down, value);
    wpos = add_where(wpos, up, share);
    wneg = add_where(wneg, down, share);
  }
  PK_HD F mean() const {
    const auto up = not_less(pos, -neg);
    const F share = select(up, wpos, wneg);
    return select(up, vpos, vneg) / select(is_zero(share), Fill<F>::of(1), share);
  }
};

}  // namespace pk
