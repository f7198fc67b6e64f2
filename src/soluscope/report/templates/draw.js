// Figures near the window come first, the others in view one at a time, so that a page of a hundred opens
// as fast as one of three; what is folded away waits until it is opened, since it has no width before.
(() => {
  const waiting = new Set(document.querySelectorAll(".plot"));
  const draw = box => {
    if (!waiting.delete(box)) return;
    const figure = JSON.parse(box.nextElementSibling.textContent);
    Plotly.newPlot(box, figure.data, figure.layout,
      {responsive: true, displaylogo: false, displayModeBar: false});
  };
  const watch = new IntersectionObserver(found => found.forEach(({isIntersecting, target}) => {
    if (isIntersecting) draw(target);
  }), {rootMargin: "400px"});
  waiting.forEach(box => watch.observe(box));
  const next = () => {
    const box = [...waiting].find(box => box.offsetParent);
    if (box) { draw(box); setTimeout(next, 20); }
  };
  setTimeout(next, 200);
})();
