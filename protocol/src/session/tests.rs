//! Sessions by hand, on both sides.
