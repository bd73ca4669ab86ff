"""Triton kernels of multi-scale deformable attention: sampling forward and backward.

Needs Triton; :mod:`ddetr_mm.models.triton_attention` imports this module at the first call.

One program works on one head of one image. Its tiles are (queries or points, channels), so that consecutive
lanes read consecutive channels of one cell; consecutive queries sample neighbouring cells, which stay in the
L1 cache. Everything is computed in float32, for tensors of any dtype.

Shapes in memory, all contiguous: value (B, S, M, D); locations (B, Q, M, L, P, 2) float32; weights
(B, Q, M, L, P); output and its gradient (B, Q, M, D); level sizes (L, 2) as (height, width); level
starts (L,). A *row* is one (image, query, head), a *point* one (row, level, point). Numbers that
depend on the images' size are not specialised, or a kernel would be compiled again for multiples of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(-3.0e38)
"""Below every logit, and finite: differences from it are numbers."""


@triton.jit
def _at(location, size):
    """Cell before a location of 0..1, the distance from it (0..1 cells), and whether it touches the map.

    Outside, cell and distance are 0; the distance of a NaN location is NaN, which propagates.
    """
    return _at_position(location * size - 0.5, size)


@triton.jit
def _at_position(position, size):
    """:func:`_at` for a position in cells, 0 at the centre of the first one."""
    inside = (position > -1.0) & (position < size)
    cell = tl.floor(tl.where(inside, position, 0.0))
    distance = tl.where(inside | (position != position), position - cell, 0.0)
    return cell.to(tl.int32), distance, inside


@triton.jit
def _on_map(y, x, height, width, mask):
    """Which of the cells in use are on the map."""
    return mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _corner(base, y, x, height, width, row_stride, channel, mask):
    """Pointers to one corner's channels, (queries, channels), and which of them are on the map."""
    on_map = _on_map(y, x, height, width, mask)
    offset = (y * width + x) * row_stride
    return base + offset[:, None] + channel[None, :], on_map[:, None]


@triton.jit
def _load_corners(base, y, x, height, width, row_stride, channel, filled, mask):
    """Values of the four corners from (y, x) on, float32; 0 outside the map."""
    p00, in00 = _corner(base, y, x, height, width, row_stride, channel, mask)
    p01, in01 = _corner(base, y, x + 1, height, width, row_stride, channel, mask)
    p10, in10 = _corner(base, y + 1, x, height, width, row_stride, channel, mask)
    p11, in11 = _corner(base, y + 1, x + 1, height, width, row_stride, channel, mask)
    v00 = tl.load(p00, mask=in00 & filled, other=0.0).to(tl.float32)
    v01 = tl.load(p01, mask=in01 & filled, other=0.0).to(tl.float32)
    v10 = tl.load(p10, mask=in10 & filled, other=0.0).to(tl.float32)
    v11 = tl.load(p11, mask=in11 & filled, other=0.0).to(tl.float32)
    return v00, v01, v10, v11


@triton.jit
def _shares(weight, low_part, right_part):
    """Weight of each corner, (queries, 1)."""
    upper, lower = weight * (1 - low_part), weight * low_part
    s00, s01 = upper * (1 - right_part), upper * right_part
    s10, s11 = lower * (1 - right_part), lower * right_part
    return s00[:, None], s01[:, None], s10[:, None], s11[:, None]


@triton.jit
def _products(v00, v01, v10, v11, gradient, low_part, right_part):
    """Gradients of each row's weight and, before the weight, of its position along x and y, in cells.

    They follow from the product of each corner's values with the output's gradient.
    """
    s00 = tl.sum(v00 * gradient, axis=1)
    s01 = tl.sum(v01 * gradient, axis=1)
    s10 = tl.sum(v10 * gradient, axis=1)
    s11 = tl.sum(v11 * gradient, axis=1)
    upper = s00 + (s01 - s00) * right_part
    lower = s10 + (s11 - s10) * right_part
    along_x = (s01 - s00) * (1 - low_part) + (s11 - s10) * low_part
    return upper + (lower - upper) * low_part, along_x, lower - upper


@triton.jit
def _add_corners(
    base, y, x, height, width, row_stride, channel, filled, mask, gradient, weight, low_part, right_part
):
    """Add each corner's part of a gradient to memory, atomically."""
    s00, s01, s10, s11 = _shares(weight, low_part, right_part)
    p00, in00 = _corner(base, y, x, height, width, row_stride, channel, mask)
    p01, in01 = _corner(base, y, x + 1, height, width, row_stride, channel, mask)
    p10, in10 = _corner(base, y + 1, x, height, width, row_stride, channel, mask)
    p11, in11 = _corner(base, y + 1, x + 1, height, width, row_stride, channel, mask)
    tl.atomic_add(p00, s00 * gradient, mask=in00 & filled, sem="relaxed")
    tl.atomic_add(p01, s01 * gradient, mask=in01 & filled, sem="relaxed")
    tl.atomic_add(p10, s10 * gradient, mask=in10 & filled, sem="relaxed")
    tl.atomic_add(p11, s11 * gradient, mask=in11 & filled, sem="relaxed")


@triton.jit
def _cell(y, x, height, width, mask, number):
    """Number of a cell, and for one outside the map or not in use a negative one that no other row has."""
    return tl.where(_on_map(y, x, height, width, mask), y * width + x, -1 - number)


@triton.jit
def _add_corners_once(
    base, y, x, height, width, row_stride, channel, filled, mask, gradient, weight, low_part, right_part,
    line, ROWS: tl.constexpr,
):  # fmt: skip
    """:func:`_add_corners`, with one addition for each cell that points of a query share.

    Rows are all points of ``ROWS[0]`` queries, ``ROWS[1]`` of each, numbered by ``line``. A query has one
    gradient, so that the shares of equal cells are summed, and the first row of them adds.
    """
    s00, s01, s10, s11 = _shares(weight, low_part, right_part)
    corners: tl.constexpr = 4 * ROWS[1]
    upper = tl.join(
        _cell(y, x, height, width, mask, 4 * line), _cell(y, x + 1, height, width, mask, 4 * line + 1)
    )
    lower = tl.join(
        _cell(y + 1, x, height, width, mask, 4 * line + 2),
        _cell(y + 1, x + 1, height, width, mask, 4 * line + 3),
    )
    shape: tl.constexpr = (ROWS[0] * ROWS[1], 1)
    shares = tl.join(
        tl.join(tl.reshape(s00, shape), tl.reshape(s01, shape)),
        tl.join(tl.reshape(s10, shape), tl.reshape(s11, shape)),
    )  # (rows, 1, right, lower)
    cells = tl.reshape(tl.join(upper, lower), (ROWS[0], corners))
    shares = tl.reshape(shares, (ROWS[0], corners))
    equal = cells[:, :, None] == cells[:, None, :]
    place = tl.arange(0, corners)
    earlier = (place[None, :] < place[:, None])[None, :, :]
    summed = tl.sum(tl.where(equal, shares[:, None, :], 0.0), axis=2)
    repeated = tl.max((equal & earlier).to(tl.int32), axis=2)
    corner: tl.constexpr = (ROWS[0] * ROWS[1], 2, 2)
    left, right = tl.split(tl.reshape(tl.where(repeated > 0, -1, cells), corner).permute(0, 2, 1))
    c00, c10 = tl.split(left)
    c01, c11 = tl.split(right)
    left, right = tl.split(tl.reshape(summed, corner).permute(0, 2, 1))
    t00, t10 = tl.split(left)
    t01, t11 = tl.split(right)
    _add_at(base, c00, row_stride, channel, filled, t00, gradient)
    _add_at(base, c01, row_stride, channel, filled, t01, gradient)
    _add_at(base, c10, row_stride, channel, filled, t10, gradient)
    _add_at(base, c11, row_stride, channel, filled, t11, gradient)


@triton.jit
def _add_at(base, cell, row_stride, channel, filled, share, gradient):
    """Add a share of each row's gradient to its cell, atomically; to none where the cell is negative."""
    pointers = base + (cell * row_stride)[:, None] + channel[None, :]
    tl.atomic_add(pointers, share[:, None] * gradient, mask=(cell >= 0)[:, None] & filled, sem="relaxed")


@triton.jit(do_not_specialize=["num_queries", "num_values"])
def forward_kernel(
    value,
    locations,
    weights,
    sizes_hw,
    starts,
    output,
    num_queries,
    num_values,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Weighted sums of bilinear samples for ``QUERIES`` queries of one head of one image.

    ``LANES`` is ``CHANNELS`` rounded up to a power of two.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    known = query < num_queries
    channel = tl.arange(0, LANES)
    filled = (channel < CHANNELS)[None, :]
    row = (image * num_queries + query) * HEADS + head
    image_base = value + (image * num_values * HEADS + head) * CHANNELS
    stride: tl.constexpr = HEADS * CHANNELS
    total = tl.zeros((QUERIES, LANES), dtype=tl.float32)
    for level in range(LEVELS):
        height = tl.load(sizes_hw + 2 * level).to(tl.int32)
        width = tl.load(sizes_hw + 2 * level + 1).to(tl.int32)
        base = image_base + tl.load(starts + level) * stride
        for number in tl.static_range(POINTS):
            point = row * (LEVELS * POINTS) + level * POINTS + number
            weight = tl.load(weights + point, mask=known, other=0.0).to(tl.float32)
            x0, right_part, x_inside = _at(tl.load(locations + 2 * point, mask=known, other=0.0), width)
            y0, low_part, y_inside = _at(tl.load(locations + 2 * point + 1, mask=known, other=0.0), height)
            mask = known & x_inside & y_inside
            v00, v01, v10, v11 = _load_corners(base, y0, x0, height, width, stride, channel, filled, mask)
            s00, s01, s10, s11 = _shares(weight, low_part, right_part)
            total += v00 * s00 + v01 * s01 + v10 * s10 + v11 * s11
    pointers = output + row[:, None] * CHANNELS + channel[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=known[:, None] & filled)


@triton.jit(do_not_specialize=["num_queries", "num_values"])
def backward_kernel(
    value,
    locations,
    weights,
    sizes_hw,
    starts,
    grad_output,
    grad_value,
    grad_locations,
    grad_weights,
    num_queries,
    num_values,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    ADD_TO_VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Gradients of locations and weights, and with ``ADD_TO_VALUE`` of values by atomic addition.

    ``grad_value`` is float32 and zero at the start. The order of atomic additions varies, so that its last
    bits differ from run to run; :func:`gather_value_gradient_kernel` is deterministic.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    known = query < num_queries
    channel = tl.arange(0, LANES)
    filled = (channel < CHANNELS)[None, :]
    row = (image * num_queries + query) * HEADS + head
    head_offset = (image * num_values * HEADS + head) * CHANNELS
    stride: tl.constexpr = HEADS * CHANNELS
    gradient = tl.load(
        grad_output + row[:, None] * CHANNELS + channel[None, :], mask=known[:, None] & filled, other=0.0
    ).to(tl.float32)
    for level in range(LEVELS):
        height = tl.load(sizes_hw + 2 * level).to(tl.int32)
        width = tl.load(sizes_hw + 2 * level + 1).to(tl.int32)
        level_offset = head_offset + tl.load(starts + level) * stride
        base = value + level_offset
        for number in tl.static_range(POINTS):
            point = row * (LEVELS * POINTS) + level * POINTS + number
            weight = tl.load(weights + point, mask=known, other=0.0).to(tl.float32)
            x0, right_part, x_inside = _at(tl.load(locations + 2 * point, mask=known, other=0.0), width)
            y0, low_part, y_inside = _at(tl.load(locations + 2 * point + 1, mask=known, other=0.0), height)
            mask = known & x_inside & y_inside
            v00, v01, v10, v11 = _load_corners(base, y0, x0, height, width, stride, channel, filled, mask)
            grad_weight, along_x, along_y = _products(v00, v01, v10, v11, gradient, low_part, right_part)
            tl.store(grad_weights + point, grad_weight.to(grad_weights.dtype.element_ty), mask=known)
            tl.store(grad_locations + 2 * point, weight * along_x * width, mask=known)
            tl.store(grad_locations + 2 * point + 1, weight * along_y * height, mask=known)
            if ADD_TO_VALUE:
                _add_corners(
                    grad_value + level_offset,
                    y0,
                    x0,
                    height,
                    width,
                    stride,
                    channel,
                    filled,
                    mask,
                    gradient,
                    weight,
                    low_part,
                    right_part,
                )


# --- Fused with softmax and offsets ---
# Inputs are what the network computes: references (B or 1, Q, L, 2 or 4) float32 as (x, y) or (cx, cy, w, h),
# raw offsets (B, Q, M, L, P, 2) and raw logits (B, Q, M, L, P) in the network's dtype.


@triton.jit
def _place(center, extent, offsets, known, size, POINTS: tl.constexpr, BOXES: tl.constexpr):
    """:func:`_at` for a point at an offset from its reference's centre, along one axis.

    The offset is in cells or, for ``BOXES``, in halves of the box's ``extent`` over ``POINTS``.
    """
    offset = tl.load(offsets, mask=known, other=0.0).to(tl.float32)
    if BOXES:
        return _at_position((center + offset / POINTS * extent * 0.5) * size - 0.5, size)
    return _at_position(center * size + offset - 0.5, size)


@triton.jit
def _reference(references, known, level, BOXES: tl.constexpr):
    """Centre and, for ``BOXES``, width and height of each row's reference at a level, as x, y, w, h."""
    coordinates: tl.constexpr = 4 if BOXES else 2
    pointers = references + level * coordinates
    center_x = tl.load(pointers, mask=known, other=0.0)
    center_y = tl.load(pointers + 1, mask=known, other=0.0)
    if not BOXES:
        return center_x, center_y, center_x, center_y
    extent_x = tl.load(pointers + 2, mask=known, other=0.0)
    extent_y = tl.load(pointers + 3, mask=known, other=0.0)
    return center_x, center_y, extent_x, extent_y


@triton.jit
def _store_logit_gradients(
    logits,
    grad_logits,
    first_point,
    known,
    log_sum,
    grad_weights,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    LEVEL_LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients through the softmax: each needs the gradients of all weights of its query.

    ``grad_weights`` is (queries x points, levels), ``first_point`` each row's point of the first level, and
    ``ROWS`` the number of queries and of points.
    """
    level = tl.arange(0, LEVEL_LANES)[None, :]
    real = known[:, None] & (level < LEVELS)
    point = first_point[:, None] + level * POINTS
    found = tl.load(logits + point, mask=real, other=0.0).to(tl.float32)
    weights = tl.where(real, tl.exp(found - log_sum[:, None]), 0.0)
    of_queries = tl.sum(tl.reshape(tl.sum(weights * grad_weights, axis=1), ROWS), axis=1)
    mean = tl.reshape(tl.broadcast_to(of_queries[:, None], ROWS), (ROWS[0] * ROWS[1],))
    gradient = weights * (grad_weights - mean[:, None])
    tl.store(grad_logits + point, gradient.to(grad_logits.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_queries", "num_values", "reference_stride"])
def fused_forward_kernel(
    value,
    references,
    offsets,
    logits,
    sizes_hw,
    starts,
    output,
    log_sums,
    num_queries,
    num_values,
    reference_stride,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BOXES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Attention of ``QUERIES`` queries of one head of one image to their points.

    ``LANES`` is ``CHANNELS`` rounded up to a power of two.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    known = query < num_queries
    channel = tl.arange(0, LANES)
    filled = (channel < CHANNELS)[None, :]
    row = query * HEADS + head
    count: tl.constexpr = LEVELS * POINTS
    coordinates: tl.constexpr = 4 if BOXES else 2
    stride: tl.constexpr = HEADS * CHANNELS
    rows_before = image * num_queries * HEADS
    image_logits = logits + rows_before * count
    image_offsets = offsets + rows_before * (2 * count)
    image_base = value + (image * num_values * HEADS + head) * CHANNELS
    reference = references + image * reference_stride + query * (LEVELS * coordinates)
    # The softmax is computed on the way: sums so far are scaled down where a level has a larger logit.
    largest = tl.full((QUERIES,), _LEAST, dtype=tl.float32)
    all_weights = tl.zeros((QUERIES,), dtype=tl.float32)
    total = tl.zeros((QUERIES, LANES), dtype=tl.float32)
    for level in range(LEVELS):
        height = tl.load(sizes_hw + 2 * level).to(tl.int32)
        width = tl.load(sizes_hw + 2 * level + 1).to(tl.int32)
        base = image_base + tl.load(starts + level) * stride
        center_x, center_y, extent_x, extent_y = _reference(reference, known, level, BOXES)
        before = largest
        for number in tl.static_range(POINTS):
            point = row * count + level * POINTS + number
            logit = tl.load(image_logits + point, mask=known, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, logit)
        shrink = tl.exp(before - largest)
        all_weights *= shrink
        total *= shrink[:, None]
        for number in tl.static_range(POINTS):
            point = row * count + level * POINTS + number
            logit = tl.load(image_logits + point, mask=known, other=0.0).to(tl.float32)
            weight = tl.exp(logit - largest)
            all_weights += weight
            x0, right_part, x_inside = _place(
                center_x, extent_x, image_offsets + 2 * point, known, width, POINTS, BOXES
            )
            y0, low_part, y_inside = _place(
                center_y, extent_y, image_offsets + 2 * point + 1, known, height, POINTS, BOXES
            )
            mask = known & x_inside & y_inside
            v00, v01, v10, v11 = _load_corners(base, y0, x0, height, width, stride, channel, filled, mask)
            s00, s01, s10, s11 = _shares(weight, low_part, right_part)
            total += v00 * s00 + v01 * s01 + v10 * s10 + v11 * s11
    total /= all_weights[:, None]
    tl.store(log_sums + rows_before + row, largest + tl.log(all_weights), mask=known)
    pointers = output + rows_before * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=known[:, None] & filled)


@triton.jit(do_not_specialize=["num_queries", "num_values", "reference_stride"])
def fused_backward_kernel(
    value, references, offsets, logits, log_sums, sizes_hw, starts, grad_output,
    grad_value, grad_offsets, grad_logits, num_queries, num_values, reference_stride,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    LANES: tl.constexpr, POINT_LANES: tl.constexpr, LEVEL_LANES: tl.constexpr, BOXES: tl.constexpr,
    ADD_TO_VALUE: tl.constexpr, MERGES: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of offsets and logits, and with ``ADD_TO_VALUE`` of values by atomic addition.

    Rows of a tile are all points of a level of ``QUERIES`` queries: a level's gradients are written at once,
    to consecutive addresses. ``POINT_LANES`` and ``LEVEL_LANES``: ``POINTS`` and ``LEVELS`` rounded up to
    powers of two. ``grad_value``: float32, zero at the start. ``MERGES``: adds by :func:`_add_corners_once`.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    line = tl.arange(0, QUERIES * POINT_LANES)
    query = tl.program_id(0) * QUERIES + line // POINT_LANES
    number = line % POINT_LANES
    known = (query < num_queries) & (number < POINTS)
    channel = tl.arange(0, LANES)
    filled = (channel < CHANNELS)[None, :]
    row = query * HEADS + head
    count: tl.constexpr = LEVELS * POINTS
    coordinates: tl.constexpr = 4 if BOXES else 2
    stride: tl.constexpr = HEADS * CHANNELS
    rows_before = image * num_queries * HEADS
    image_logits = logits + rows_before * count
    image_offsets = offsets + rows_before * (2 * count)
    head_offset = (image * num_values * HEADS + head) * CHANNELS
    reference = references + image * reference_stride + query * (LEVELS * coordinates)
    log_sum = tl.load(log_sums + rows_before + row, mask=known, other=0.0)
    in_output = rows_before * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
    in_row = known[:, None] & filled
    gradient = tl.load(grad_output + in_output, mask=in_row, other=0.0).to(tl.float32)
    axis = tl.arange(0, 2)[None, :]
    level_number = tl.arange(0, LEVEL_LANES)[None, :]
    grad_weights = tl.zeros((QUERIES * POINT_LANES, LEVEL_LANES), dtype=tl.float32)
    for level in range(LEVELS):
        height = tl.load(sizes_hw + 2 * level).to(tl.int32)
        width = tl.load(sizes_hw + 2 * level + 1).to(tl.int32)
        level_offset = head_offset + tl.load(starts + level) * stride
        base = value + level_offset
        center_x, center_y, extent_x, extent_y = _reference(reference, known, level, BOXES)
        point = row * count + level * POINTS + number
        logit = tl.load(image_logits + point, mask=known, other=0.0).to(tl.float32)
        weight = tl.exp(logit - log_sum)
        x0, right_part, x_inside = _place(
            center_x, extent_x, image_offsets + 2 * point, known, width, POINTS, BOXES
        )
        y0, low_part, y_inside = _place(
            center_y, extent_y, image_offsets + 2 * point + 1, known, height, POINTS, BOXES
        )
        mask = known & x_inside & y_inside
        v00, v01, v10, v11 = _load_corners(base, y0, x0, height, width, stride, channel, filled, mask)
        grad_weight, along_x, along_y = _products(v00, v01, v10, v11, gradient, low_part, right_part)
        grad_weights = tl.where(level_number == level, grad_weight[:, None], grad_weights)
        grad_x, grad_y = weight * along_x, weight * along_y
        if BOXES:
            grad_x *= extent_x * width * (0.5 / POINTS)
            grad_y *= extent_y * height * (0.5 / POINTS)
        tl.store(
            grad_offsets + rows_before * (2 * count) + 2 * point[:, None] + axis,
            tl.join(grad_x, grad_y).to(grad_offsets.dtype.element_ty),
            mask=known[:, None],
        )
        if ADD_TO_VALUE and MERGES:
            _add_corners_once(
                grad_value + level_offset, y0, x0, height, width, stride, channel, filled, mask,
                gradient, weight, low_part, right_part, line, (QUERIES, POINT_LANES),
            )  # fmt: skip
        elif ADD_TO_VALUE:
            _add_corners(
                grad_value + level_offset, y0, x0, height, width, stride, channel, filled, mask,
                gradient, weight, low_part, right_part,
            )  # fmt: skip
    first_point = row * count + number
    _store_logit_gradients(
        image_logits, grad_logits + rows_before * count, first_point, known, log_sum, grad_weights,
        LEVELS, POINTS, LEVEL_LANES, (QUERIES, POINT_LANES),
    )  # fmt: skip


# --- Gradient of the values by a gather ---


@triton.jit(do_not_specialize=["num_queries", "num_points", "bins_per_head", "num_bins"])
def bin_kernel(
    locations,
    sizes_hw,
    bin_starts,
    bins,
    num_points,
    num_queries,
    bins_per_head,
    num_bins,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the bin of every point: its upper left cell on a map with one more row and column.

    A level of H x W has (H + 1) x (W + 1) bins, the first for cells at row or column -1; a head of an
    image has ``bins_per_head``. Points that touch no cell go into bin ``num_bins``, after all others.
    """
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = point < num_points
    level = (point // POINTS) % LEVELS
    row = point // (LEVELS * POINTS)
    image_head = row // (num_queries * HEADS) * HEADS + row % HEADS
    height = tl.load(sizes_hw + 2 * level, mask=known, other=1).to(tl.int32)
    width = tl.load(sizes_hw + 2 * level + 1, mask=known, other=1).to(tl.int32)
    x0, _, x_inside = _at(tl.load(locations + 2 * point, mask=known, other=0.0), width)
    y0, _, y_inside = _at(tl.load(locations + 2 * point + 1, mask=known, other=0.0), height)
    cell = (y0 + 1) * (width + 1) + x0 + 1
    number = image_head * bins_per_head + tl.load(bin_starts + level, mask=known, other=0) + cell
    number = tl.where(x_inside & y_inside, number, num_bins)
    tl.store(bins + point, number.to(bins.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_values", "bins_per_head"])
def gather_value_gradient_kernel(
    locations,
    weights,
    sizes_hw,
    starts,
    bin_starts,
    order,
    bin_offsets,
    grad_output,
    grad_value,
    num_values,
    bins_per_head,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of one cell of one head, summed over the points around it in a fixed order.

    The points that touch cell (y, x) lie in the bins of rows y and y + 1, columns x and x + 1 of the
    enlarged map; the two bins of a row are neighbours, so ``order`` holds them as two runs.
    """
    cell = tl.program_id(0)
    image_head = tl.program_id(1).to(tl.int64)
    level = 0
    for number in tl.static_range(1, LEVELS):
        level += (cell >= tl.load(starts + number)).to(tl.int32)
    height = tl.load(sizes_hw + 2 * level).to(tl.int32)
    width = tl.load(sizes_hw + 2 * level + 1).to(tl.int32)
    in_level = cell - tl.load(starts + level).to(tl.int32)
    cell_y, cell_x = in_level // width, in_level % width
    channel = tl.arange(0, LANES)
    filled = (channel < CHANNELS)[None, :]
    total = tl.zeros((LANES,), dtype=tl.float32)
    head_bins = image_head * bins_per_head + tl.load(bin_starts + level)
    for below in tl.static_range(2):
        first_bin = head_bins + (cell_y + below) * (width + 1) + cell_x
        begin = tl.load(bin_offsets + first_bin)
        end = tl.load(bin_offsets + first_bin + 2)
        while begin < end:
            place = begin + tl.arange(0, BLOCK)
            known = place < end
            point = tl.load(order + place, mask=known, other=0)
            x = tl.load(locations + 2 * point, mask=known, other=0.0) * width - 0.5
            y = tl.load(locations + 2 * point + 1, mask=known, other=0.0) * height - 0.5
            weight = tl.load(weights + point, mask=known, other=0.0).to(tl.float32)
            share = (1 - tl.abs(x - cell_x)) * (1 - tl.abs(y - cell_y))
            row = point // (LEVELS * POINTS)
            pointers = grad_output + row[:, None] * CHANNELS + channel[None, :]
            gradient = tl.load(pointers, mask=known[:, None] & filled, other=0.0).to(tl.float32)
            share = tl.where(known, share * weight, 0.0)
            total += tl.sum(gradient * share[:, None], axis=0)
            begin += BLOCK
    image, head = image_head // HEADS, image_head % HEADS
    target = grad_value + ((image * num_values + cell) * HEADS + head) * CHANNELS + channel
    tl.store(target, total.to(grad_value.dtype.element_ty), mask=channel < CHANNELS)
