"""Mesh simplification onto existing vertices, with a triangle budget per part."""

from __future__ import annotations

import heapq
import math

BORDER_WEIGHT = 3.0
LENGTH_WEIGHT = 1e-7
MAX_NORMAL_TURN = 0.3  # cosine


def _sub(a, b):
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _cross(a, b):
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _normal(p, q, r):
    """Unit normal and area of triangle (p, q, r)."""
    n = _cross(_sub(q, p), _sub(r, p))
    length = math.sqrt(_dot(n, n))
    return (tuple(c / length for c in n), 0.5 * length) if length > 1e-14 else ((0.0, 0.0, 0.0), 0.0)


def _plane(n, point, weight):
    """Quadric of the squared distance to a plane, as its ten distinct coefficients."""
    a, b, c = n
    d = -_dot(n, point)
    return [weight * f for f in (a * a, a * b, a * c, a * d, b * b, b * c, b * d, c * c, c * d, d * d)]


def _evaluate(q, r, p):
    x, y, z = p
    f = [i + j for i, j in zip(q, r, strict=True)]
    return (
        x * (f[0] * x + 2.0 * (f[1] * y + f[2] * z + f[3]))
        + y * (f[4] * y + 2.0 * (f[5] * z + f[6]))
        + z * (f[7] * z + 2.0 * f[8])
        + f[9]
    )


class Decimator:
    """Half-edge collapses u -> v in order of quadric cost at v; positions of kept vertices never move."""

    def __init__(self, positions, faces, parts, protected, budgets):
        self.p = [tuple(map(float, x)) for x in positions]
        self.faces = [list(map(int, f)) for f in faces]
        self.parts = [int(x) for x in parts]
        self.protected = set(map(int, protected))
        self.budgets = dict(budgets)
        self.count = {k: self.parts.count(k) for k in set(self.parts)}
        self.around = [set() for _ in self.p]
        for t, face in enumerate(self.faces):
            for v in face:
                self.around[v].add(t)
        self.version = [0] * len(self.p)
        self.quadric = [[0.0] * 10 for _ in self.p]
        self.heap: list = []
        self._init_quadrics()

    def _shared(self, u, v):
        return self.around[u] & self.around[v]

    def _is_border(self, triangles):
        return len(triangles) == 1 or len({self.parts[t] for t in triangles}) > 1

    def _neighbours(self, u):
        return {v for t in self.around[u] for v in self.faces[t]} - {u}

    def _add(self, v, q):
        self.quadric[v] = [i + j for i, j in zip(self.quadric[v], q, strict=True)]

    def _init_quadrics(self):
        normals = []
        for face in self.faces:
            n, area = _normal(*(self.p[v] for v in face))
            normals.append(n)
            q = _plane(n, self.p[face[0]], area)
            for v in face:
                self._add(v, q)
        for t, face in enumerate(self.faces):
            for i in range(3):
                u, v = face[i], face[(i + 1) % 3]
                if self._is_border(self._shared(u, v)):
                    edge = _sub(self.p[v], self.p[u])
                    side = _cross(edge, normals[t])
                    length = math.sqrt(_dot(side, side))
                    if length > 1e-14:
                        n = tuple(c / length for c in side)
                        q = _plane(n, self.p[u], BORDER_WEIGHT * _dot(edge, edge))
                        self._add(u, q)
                        self._add(v, q)

    def _push(self, u, v):
        if u not in self.protected:
            edge = _sub(self.p[u], self.p[v])
            cost = _evaluate(self.quadric[u], self.quadric[v], self.p[v]) + LENGTH_WEIGHT * _dot(edge, edge)
            heapq.heappush(self.heap, (cost, u, v, self.version[u], self.version[v]))

    def _allowed(self, u, v):
        shared = self._shared(u, v)
        neighbours_u = self._neighbours(u)
        common = neighbours_u & self._neighbours(v)
        if not shared or len(common) != len(shared) or len(common) > 2:
            return False
        if any(self.count[self.parts[t]] <= self.budgets[self.parts[t]] for t in shared):
            return False
        # A vertex on a border may only slide along that border, else the border would move.
        if not self._is_border(shared) and any(self._is_border(self._shared(u, n)) for n in neighbours_u):
            return False
        for t in self.around[u] - shared:
            old, _ = _normal(*(self.p[x] for x in self.faces[t]))
            new, area = _normal(*(self.p[v if x == u else x] for x in self.faces[t]))
            if area == 0.0 or _dot(old, new) < MAX_NORMAL_TURN:
                return False
        return True

    def _collapse(self, u, v):
        for t in list(self.around[u]):
            face = self.faces[t]
            if v in face:
                self.count[self.parts[t]] -= 1
                for x in face:
                    self.around[x].discard(t)
            else:
                face[face.index(u)] = v
                self.around[v].add(t)
        self.around[u] = set()
        self._add(v, self.quadric[u])
        self.version[u] += 1
        self.version[v] += 1
        for n in self._neighbours(v):
            self._push(n, v)
            self._push(v, n)

    def run(self):
        """Collapses until every part is at its budget; returns the surviving triangles and parts."""
        for u in range(len(self.p)):
            for v in self._neighbours(u):
                self._push(u, v)
        while self.heap:
            _, u, v, version_u, version_v = heapq.heappop(self.heap)
            if version_u == self.version[u] and version_v == self.version[v] and self._allowed(u, v):
                self._collapse(u, v)
        alive = sorted({t for triangles in self.around for t in triangles})
        return [self.faces[t] for t in alive], [self.parts[t] for t in alive]
