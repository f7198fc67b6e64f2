// Figures near the window are drawn first, then the other figures one at a time, so that a page of a hundred
// figures opens as fast as a page of three. Folded figures wait until they are opened: before that they have
// no width.
(() => {
  const waiting = new Set(document.querySelectorAll(".plot"));
  for (const box of waiting) {
    box.style.minWidth = box.dataset.width + "px";
    box.style.height = box.dataset.height + "px";
  }
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
