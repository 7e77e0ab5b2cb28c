//! Linear programs in two variables, solved exactly: the optimum lies on a corner, and two variables have few.

/// `a · x <= bound`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HalfPlane {
    pub a: [f64; 2],
    pub bound: f64,
}

impl HalfPlane {
    pub fn at_most(a: [f64; 2], bound: f64) -> Self {
        HalfPlane { a, bound }
    }

    /// Within rounding: a corner lies on its two lines only up to the last bits.
    fn holds(&self, x: [f64; 2]) -> bool {
        let (terms, scale) =
            ([self.a[0] * x[0], self.a[1] * x[1]], self.a[0].abs() + self.a[1].abs() + self.bound.abs());
        terms[0] + terms[1] - self.bound <= 1e-12 * scale
    }

    /// The corner of two lines, None where they are parallel.
    fn corner(&self, other: &HalfPlane) -> Option<[f64; 2]> {
        let determinant = self.a[0] * other.a[1] - self.a[1] * other.a[0];
        let scale = (self.a[0].abs() + self.a[1].abs()) * (other.a[0].abs() + other.a[1].abs());
        if determinant.abs() <= 1e-15 * scale {
            return None;
        }
        let x = (self.bound * other.a[1] - self.a[1] * other.bound) / determinant;
        let y = (self.a[0] * other.bound - self.bound * other.a[0]) / determinant;
        Some([x, y])
    }
}

/// The point of the polygon where `cost · x` is least, the first corner of equals; None where nothing satisfies all half-planes.
///
/// The polygon must be bounded (callers put it in a box): then it has a corner if it has a point.
pub fn minimise(cost: [f64; 2], half_planes: &[HalfPlane]) -> Option<[f64; 2]> {
    let corners = half_planes.iter().enumerate().flat_map(|(i, one)| {
        let others = &half_planes[i + 1..];
        others.iter().filter_map(move |other| one.corner(other))
    });
    let value = |x: [f64; 2]| cost[0] * x[0] + cost[1] * x[1];
    corners
        .filter(|corner| half_planes.iter().all(|half_plane| half_plane.holds(*corner)))
        .reduce(|best, corner| if value(corner) < value(best) { corner } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_box(mut more: Vec<HalfPlane>) -> Vec<HalfPlane> {
        for axis in [[1.0, 0.0], [0.0, 1.0]] {
            more.push(HalfPlane::at_most(axis, 1.0));
            more.push(HalfPlane::at_most(axis.map(|a: f64| -a), 0.0));
        }
        more
    }

    /// Against a fine grid over the box: no grid point that satisfies everything is better than the corner that was found.
    #[test]
    fn no_point_of_a_grid_is_better() {
        let mut seed = 12_345u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        };
        let mut solved = 0;
        for _ in 0..300 {
            let cuts = (0..3).map(|_| HalfPlane::at_most([random(), random()], 0.7 * random())).collect();
            let planes = in_box(cuts);
            let cost = [random(), random()];
            let found = minimise(cost, &planes);
            let grid = (0..=60).flat_map(|i| (0..=60).map(move |j| [i as f64 / 60.0, j as f64 / 60.0]));
            let feasible =
                grid.filter(|x| planes.iter().all(|plane| plane.a[0] * x[0] + plane.a[1] * x[1] <= plane.bound));
            for x in feasible {
                let best = found.unwrap_or_else(|| panic!("{x:?} satisfies {planes:?}"));
                assert!(cost[0] * best[0] + cost[1] * best[1] <= cost[0] * x[0] + cost[1] * x[1] + 1e-12, "{planes:?}");
                solved += 1;
            }
            if let Some([x, y]) = found {
                assert!((-1e-12..=1.0 + 1e-12).contains(&x) && (-1e-12..=1.0 + 1e-12).contains(&y));
            }
        }
        assert!(solved > 10_000, "the cases are not all empty: {solved}");
    }

    #[test]
    fn corners_edges_and_nothing() {
        // x + 2y <= 1 in the box, maximise x + y: the corner (1, 0).
        let planes = in_box(vec![HalfPlane::at_most([1.0, 2.0], 1.0)]);
        assert_eq!(minimise([-1.0, -1.0], &planes), Some([1.0, 0.0]));
        // x + y >= 3 is outside the box.
        assert_eq!(minimise([1.0, 1.0], &in_box(vec![HalfPlane::at_most([-1.0, -1.0], -3.0)])), None);
        // A segment: x = 1/4 exactly.
        let line = vec![HalfPlane::at_most([4.0, 0.0], 1.0), HalfPlane::at_most([-4.0, 0.0], -1.0)];
        assert_eq!(minimise([0.0, 1.0], &in_box(line)), Some([0.25, 0.0]));
        // One point.
        let planes = vec![HalfPlane::at_most([1.0, 0.0], 0.0), HalfPlane::at_most([0.0, 1.0], 0.0)];
        assert_eq!(minimise([1.0, -1.0], &in_box(planes)), Some([0.0, 0.0]));
    }
}
